"""Options -> a runner whose scores were checked, and what to tell the world about it."""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence

import psutil
import torch
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment, ceil_block

from rewardserve.engine.base import EngineInfo
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.runner import PackedRunner, PaddedRunner, Runner
from rewardserve.errors import LoadFailed
from rewardserve.models import loader
from rewardserve.models.backbone import KVPool, NotPackable, Pack
from rewardserve.models.reward_model import RewardModel
from rewardserve.models.spec import ModelSpec, read_spec
from rewardserve.models.text_export import export_text

log = logging.getLogger(__name__)

# Largest relative difference (L2, of the final hidden states) to the padded forward that rounding explains. Backbones
# whose attention cannot be routed to ours are off by 13 % and more.
CANARY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LONGEST_CANARY = 1500  # tokens; a window longer than that is not crossed by the canary
MAX_AUTO_CACHE_BYTES = 4 << 30
MAX_BLOCKS = 65_536  # eight million tokens of prompts: beyond that bookkeeping costs more than it finds


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    runner: Runner
    info: EngineInfo
    max_batch_tokens: int
    model: RewardModel

    def fall_back(self, reason: str) -> "Loaded":
        """The same model on the padded path."""
        log.error("falling back to the padded path: %s", reason)
        self.model.backbone.prepare_padded()
        runner = PaddedRunner(self.model, self.max_batch_tokens)
        info = dataclasses.replace(self.info, path="padded", path_reason=reason, prefix_cache_tokens=0)
        return dataclasses.replace(self, runner=runner, info=info)


def load_runner(options: NativeOptions) -> Loaded:
    """Loads, checks and sizes everything. Raises LoadFailed with what to do about it."""
    spec = read_spec(options.source)
    device = loader.choose_device(options.device)
    dtype = loader.choose_dtype(options.dtype, spec, device)
    if device.type == "cpu":
        torch.set_num_threads(options.num_threads or len(os.sched_getaffinity(0)))
    log.info("loading %s (%s) as %s on %s", options.source, spec.architecture, dtype, device)
    model = loader.load(spec, dtype, device)
    max_batch_tokens = options.max_batch_tokens or (2048 if device.type == "cpu" else 8192)
    max_length = min(options.max_length or spec.max_length, spec.max_length)
    text, text_missing_reason = export_text(spec.folder)
    padded = Loaded(
        PaddedRunner(model, max_batch_tokens),
        EngineInfo(
            version=f"{spec.version}-{DTYPE_NAMES[dtype]}",
            architecture=spec.architecture,
            path="padded",
            path_reason="asked for",
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            num_parameters=model.num_parameters,
            max_length=max_length,
            vocab_size=spec.config.get_text_config().vocab_size,
            canary_error=0.0,
            prefix_cache_tokens=0,
            bos_token_id=_first_id(getattr(spec.config.get_text_config(), "bos_token_id", None)),
            text=text,
            text_missing_reason=text_missing_reason,
        ),
        max_batch_tokens,
        model,
    )
    if options.path == "padded":
        return padded
    try:
        return _pack(padded, spec, options, device, dtype)
    except NotPackable as reason:
        if options.path == "packed":
            raise LoadFailed(f"{options.source}: cannot be packed: {reason}; use path = auto") from reason
        return padded.fall_back(str(reason))


def _first_id(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def _pack(padded: Loaded, spec: ModelSpec, options: NativeOptions, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Moves a model from the padded to the packed path if its canary agrees. Raises NotPackable."""
    pool, error = _find_packing(padded.model, spec, options, device, CANARY_TOLERANCE[dtype])
    num_blocks = _num_blocks(options, device, pool.bytes_per_block)
    max_length = min(padded.info.max_length, (num_blocks - 2) * BLOCK_TOKENS)
    if max_length < padded.info.max_length:
        log.warning("max_length is %d, not %d: that is what the prefix cache holds", max_length, padded.info.max_length)
    info = dataclasses.replace(
        padded.info,
        path="packed",
        path_reason="",
        max_length=max_length,
        canary_error=error,
        prefix_cache_tokens=num_blocks * BLOCK_TOKENS,
    )
    return dataclasses.replace(padded, runner=PackedRunner(padded.model, KVPool(num_blocks)), info=info)


def _find_packing(
    model: RewardModel, spec: ModelSpec, options: NativeOptions, device: torch.device, tolerance: float
) -> tuple[KVPool, float]:
    """Prepares the backbone with its last layer pruned or, where that fails its canary, whole. Raises NotPackable."""
    compile_layers = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
    prompt, responses = _canary_tokens(spec)
    wanted = _padded_reference(model, [prompt + response for response in responses])
    reason = ""
    for prune in (True, False):
        model.backbone.prepare_packed(prune, compile_layers)
        try:
            pool, error = _run_canary(model, prompt, responses, wanted)
        except Exception as failure:  # a backbone that cannot be packed may fail anywhere in itself
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        else:
            if error <= tolerance:
                return pool, error
            reason = f"final hidden states differ by {error:.1e} from the padded forward"
        log.info("canary with pruning %s: %s", "on" if prune else "off", reason)
        model.backbone.prepare_padded()
    raise NotPackable(f"canary: {reason}")


def _padded_reference(model: RewardModel, rows: Sequence[list[int]]) -> torch.Tensor:
    """Final hidden states by plain padded Hugging Face, in its eager attention: the one that knows every option."""
    module = model.backbone.module
    implementation = module.config._attn_implementation
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        hidden = model.backbone.run_padded([torch.tensor(row) for row in rows])
    module.set_attn_implementation(implementation)
    return hidden


def _canary_tokens(spec: ModelSpec) -> tuple[list[int], list[list[int]]]:
    """A prompt and responses of pseudo-random ids: past a block's border, and past the attention window if in reach."""
    config = spec.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = BLOCK_TOKENS + 9
    if window and window + length < LONGEST_CANARY:
        length += window
    length = min(length, spec.max_length - 30)
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (max(1, count),), generator=generator).tolist()

    return tokens(length), [tokens(count) for count in (21, 2, 1, 9, 5, 14, 30)]


def _run_canary(
    model: RewardModel, prompt: list[int], responses: list[list[int]], wanted: torch.Tensor
) -> tuple[KVPool, float]:
    """Relative difference to `wanted`, the larger of the cold prompt's and of the prompt read back from blocks.

    The median over the responses: a mistake of ours shows in all of them, while in low precision a mixture of experts
    may send a single token elsewhere for a difference of one rounding.
    """
    num_blocks = ceil_block(len(prompt)) // BLOCK_TOKENS
    pool, blocks = KVPool(num_blocks), tuple(range(num_blocks))
    cold = _canary_pack(model, prompt, responses, blocks, with_prompt=True)
    warm = _canary_pack(model, prompt, responses, blocks, with_prompt=False)
    with torch.inference_mode():
        states = [model.backbone.run_packed(pack, pool) for pack in (cold, warm)]
    errors = [((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item() for got in states]
    return pool, max(float("inf") if math.isnan(error) else error for error in errors)


def _canary_pack(
    model: RewardModel, prompt: list[int], responses: list[list[int]], blocks: tuple[int, ...], with_prompt: bool
) -> Pack:
    ids = list(prompt) if with_prompt else []
    positions = list(range(len(ids)))
    segments = [Segment(0, len(prompt), 0, blocks, store=True)] if with_prompt else []
    for response in responses:
        segments.append(Segment(len(ids), len(response), len(prompt), blocks, store=False))
        ids += response
        positions += range(len(prompt), len(prompt) + len(response))
    pooled = tuple(i for i, segment in enumerate(segments) if not segment.store)
    rows = [segments[i].row + segments[i].num_rows - 1 for i in pooled]
    device = model.backbone.device
    ids_, positions_, rows_ = (torch.tensor(values, device=device) for values in (ids, positions, rows))
    return Pack(ids_, positions_, tuple(segments), pooled, rows_)


def _num_blocks(options: NativeOptions, device: torch.device, bytes_per_block: int) -> int:
    """As many blocks as the prefix cache's bytes hold, but no fewer than one short request needs."""
    budget = options.prefix_cache_bytes
    if not budget and device.type == "cuda":
        budget = int(0.6 * torch.cuda.mem_get_info(device)[0])
    elif not budget:
        budget = min(psutil.virtual_memory().available // 10, MAX_AUTO_CACHE_BYTES)
    num_blocks = budget // bytes_per_block
    if num_blocks < 4:
        need = 4 * bytes_per_block
        raise LoadFailed(f"the prefix cache of {budget} bytes holds no request; give it at least {need} bytes")
    return min(num_blocks, MAX_BLOCKS)
