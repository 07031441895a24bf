"""The prefix cache's second tier, in host memory behind a GPU: whether it can be had, and whether it is worth it."""

import logging
import time
from collections.abc import Callable

import torch
from rewardserve_kernels.ragged import BLOCK_TOKENS

from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.sizing import compute, free_bytes, largest_step
from rewardserve.errors import OptionsDoNotFit
from rewardserve.models.checkpoint import first_line
from rewardserve.models.kv_pool import HostBlocks, KVPool
from rewardserve.models.reward_model import RewardModel

log = logging.getLogger(__name__)

BLOCKS_COPIED = 8  # to find out how fast that is


def host_blocks(options: NativeOptions, pool: KVPool, bytes_per_block: int) -> HostBlocks | None:
    """The second tier of the prefix cache, where one is asked for. Raises OptionsDoNotFit where there can be none."""
    num_slots = options.host_cache_bytes // bytes_per_block
    if not num_slots:
        return None
    if pool.whole is None:
        raise OptionsDoNotFit("a host cache needs layers that are all of one shape; leave out host_cache_mb")
    size, free = options.host_cache_bytes >> 20, free_bytes()
    if num_slots * bytes_per_block > free:  # pinned, or used, it would be ended by the system without a word
        raise OptionsDoNotFit(f"a host cache of {size} MB does not fit: {free >> 20} MB of memory are free; give less")
    try:
        return HostBlocks(pool, num_slots)
    except RuntimeError as error:
        raise OptionsDoNotFit(
            f"a host cache of {size} MB cannot be had: {first_line(error)}; give less of it"
        ) from error


def compare_host_tier(model: RewardModel, pool: KVPool, host: HostBlocks, num_tokens: int, max_length: int) -> None:
    """Warns where a GPU computes a block sooner than it is copied back, as of small models: the tier costs time then.

    Nothing may be served yet: blocks are written to.
    """
    blocks, rows = range(min(BLOCKS_COPIED, host.num_slots, pool.num_blocks)), largest_step(num_tokens, max_length)
    copying = _seconds(lambda: [host.copy_back(block, block) for block in blocks]) / len(blocks)
    computing = _seconds(lambda: compute(model, pool, rows)) * BLOCK_TOKENS / num_tokens
    log.log(
        logging.WARNING if copying > computing else logging.INFO,
        "%d tokens of a prompt are copied back from host memory in %.2f ms and computed in %.2f ms%s",
        BLOCK_TOKENS,
        1e3 * copying,
        1e3 * computing,
        ": this model is faster without --host-cache-mb" if copying > computing else "",
    )


def _seconds(action: Callable[[], object]) -> float:
    """Of the second time: the first one sets things up."""
    action()
    torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - started
