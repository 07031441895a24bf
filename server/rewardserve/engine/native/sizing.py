"""How much memory is for what: stored prompts, and a step beside them."""

import numpy as np
import torch
from rewardserve_kernels.ragged import Segment

from rewardserve.engine.cgroups import bytes_left
from rewardserve.engine.native.batch import PackRows, build_pack
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import OptionsDoNotFit
from rewardserve.models.kv_pool import KVPool
from rewardserve.models.reward_model import RewardModel

MAX_AUTO_CACHE_BYTES = 4 << 30
GRAPHS_OF_A_STEP = (
    0.5  # what CUDA graphs take, of a step's memory: theirs have a quarter of its rows, and it is their own
)
MAX_BLOCKS = 65_536  # eight million tokens of prompts: beyond that bookkeeping costs more than it finds


def bytes_of_a_step(model: RewardModel, pool: KVPool, num_tokens: int, max_length: int) -> int:
    """What a GPU needs beside weights and stored prompts while it computes the largest step there may be: the step is
    tried, with a pool of a few blocks. Raises OptionsDoNotFit where it does not fit.
    """
    device = model.backbone.device
    if model.takes_mean:
        pool.keep_sums(model.backbone.config.hidden_size, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        compute(model, pool, largest_step(num_tokens, max_length))
    except torch.OutOfMemoryError as error:
        raise OptionsDoNotFit(
            f"a forward of max_batch_tokens = {num_tokens} does not fit the device; give fewer"
        ) from error
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return peak - before


def largest_step(num_tokens: int, max_length: int) -> PackRows:
    starts = range(0, num_tokens, max_length)
    segments = [Segment(row, min(max_length, num_tokens - row), 0, (), store=False) for row in starts]
    return PackRows(
        np.zeros(num_tokens, np.int32),
        np.concatenate([np.arange(segment.num_rows, dtype=np.int32) for segment in segments]),
        tuple(segments),
        tuple(segments),
        tuple(range(len(segments))),
    )


def compute(model: RewardModel, pool: KVPool, rows: PackRows) -> None:
    """To its end."""
    model.features_packed(build_pack(rows, model.backbone, True, model.takes_mean), pool).cpu()


def choose_num_blocks(options: NativeOptions, device: torch.device, bytes_per_block: int, beside_bytes: int) -> int:
    """As many blocks as the prefix cache's bytes hold; `beside_bytes` are left free on a GPU, for what is computed.

    Raises OptionsDoNotFit where that is less than one short request needs, or more than there is.
    """
    budget, least = options.prefix_cache_bytes, 4 * bytes_per_block
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        room = free - beside_bytes
        if room < least:
            raise OptionsDoNotFit(
                f"the device has {free >> 20} MB left, and forwards need {beside_bytes >> 20} of it: no request fits "
                "beside them; give fewer --max-batch-tokens"
            )
        if budget > room:
            raise OptionsDoNotFit(
                f"a prefix cache of {budget >> 20} MB does not fit: the device has {free >> 20} left, and forwards "
                f"need {beside_bytes >> 20} of it; give --prefix-cache-mb {room >> 20}, or fewer --max-batch-tokens"
            )
        budget = budget or max(least, min(int(0.6 * free), room))
    elif budget:  # all of it is made resident, and a system that runs out of memory ends processes without a word
        free = free_bytes()
        if min(budget, MAX_BLOCKS * bytes_per_block) > free:
            raise OptionsDoNotFit(
                f"a prefix cache of {budget >> 20} MB does not fit: {free >> 20} MB of memory are free; give less of "
                "--prefix-cache-mb, or leave it out"
            )
    budget = budget or auto_cache_bytes()
    if budget < least:
        raise OptionsDoNotFit(
            f"a prefix cache of {budget >> 20} MB holds no request; give --prefix-cache-mb {-(-least >> 20)} at least"
        )
    return min(budget // bytes_per_block, MAX_BLOCKS)


def default_batch_tokens(on_cpu: bool) -> int:
    """On two cores of a CPU 4096 are 5 % ahead of 2048 where prompts are long, and level elsewhere; what waits for the
    forward under way waits longer. A GPU's multiprocessors are expected to be all busy from 8192 on, for models of 0.6B
    to 14B: counted, not measured yet (benchmarks/NOTES.md, 7).
    """
    return 4096 if on_cpu else 8192


def auto_cache_bytes() -> int:
    """What the prefix cache gets on a CPU by default."""
    return min(free_bytes() // 10, MAX_AUTO_CACHE_BYTES)


def free_bytes() -> int:
    """Memory that this process can still take: the machine's or, if that is less, its container's or its job's."""
    import psutil  # here: without a host cache, an engine on a GPU needs nothing beyond torch, transformers and numpy

    return max(0, min([psutil.virtual_memory().available, *bytes_left()]))
