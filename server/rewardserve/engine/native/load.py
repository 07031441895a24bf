"""Options -> a runner whose scores were checked, and what to tell the world about it."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rewardserve_kernels.ragged import BLOCK_TOKENS

from rewardserve.engine.base import ADAPTED, EngineInfo
from rewardserve.engine.cgroups import num_cores
from rewardserve.engine.native.canary import Canary
from rewardserve.engine.native.gpu import compile_options, find_place_for_kernels, make_batch_invariant, use_device
from rewardserve.engine.native.graphs import capture
from rewardserve.engine.native.host_tier import compare_host_tier, host_blocks
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.runner import PackedRunner, PaddedRunner, Runner
from rewardserve.engine.native.sizing import (
    GRAPHS_OF_A_STEP,
    bytes_of_a_step,
    choose_num_blocks,
    default_batch_tokens,
)
from rewardserve.engine.native.speed_up import Subject, keep_freed_memory, speed_up
from rewardserve.engine.vllm_options import HOW_TO_INSTALL
from rewardserve.errors import LoadFailed, OptionsDoNotFit
from rewardserve.models import loader
from rewardserve.models.checkpoint import first_line
from rewardserve.models.kv_pool import KVPool
from rewardserve.models.packing import NotPackable, check_packable
from rewardserve.models.reads import ReadAt, ReadPlan
from rewardserve.models.refresh import check_refresh, refresh
from rewardserve.models.reward_model import RewardModel
from rewardserve.models.spec import ModelSpec, read_spec
from rewardserve.models.text_export import text_of

log = logging.getLogger(__name__)

# Largest relative difference (L2, of the final hidden states) to the padded forward that rounding explains. Backbones
# whose attention cannot be routed to ours are off by 13 % and more.
CANARY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ATTEMPTS_TO_READ = 3  # weights that are taken over in place, while somebody writes to their files
MAX_PARAMETERS_FOR_GRAPHS = 5_000_000_000  # the forwards of larger ones take longer to compute than to launch


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    runner: Runner
    info: EngineInfo
    max_batch_tokens: int
    model: RewardModel
    specs: tuple[ModelSpec, ...] = ()  # of the models that share the backbone; of a pretended one there is none
    trunks: tuple[int, ...] = (0,)  # of each, the first one whose backbone computes the same

    @property
    def reads(self) -> tuple[ReadPlan, ...]:
        """Of each of the models."""
        return tuple(spec.recipe.reads for spec in self.specs) or (ReadPlan(),)

    def refreshed(self, source: str) -> "Loaded":
        """The same model with the weights of another checkpoint of its shapes, in place.

        Raises LoadFailed, and nothing has changed, or anything else, and the model is not to be used any more.
        """
        if len(self.specs) > 1:
            raise LoadFailed(f"{source}: the model shares its backbone with others, which would change too; use Swap")
        spec = self._take_over(source)
        quality = self.info.version.removeprefix(self.specs[0].version)
        info = dataclasses.replace(self.info, version=f"{spec.version}{quality}")
        return dataclasses.replace(self, info=info, specs=(spec,))

    def _take_over(self, source: str) -> ModelSpec:
        """Whose weights it has then: those of files that nobody wrote to while they were read, at the last attempt."""
        change: str | None = None
        for _ in range(ATTEMPTS_TO_READ):
            try:
                spec = self._fitting(source)
            except LoadFailed as error:
                if change is None:
                    raise
                change = str(error)
                break
            try:
                with torch.inference_mode():
                    refresh(self.model, spec)
            except LoadFailed as error:  # of one weight: those before it are taken over
                change = str(error)
                break
            change = spec.change()
            if change is None:
                return spec
        assert change is not None
        self._go_back(change)
        raise LoadFailed(change)

    def _fitting(self, source: str) -> ModelSpec:
        """Of what can be taken over in place. Raises LoadFailed for anything else; nothing has changed then."""
        try:
            spec = read_spec(source)
            check_refresh(self.model, spec, self.specs[0])
        except LoadFailed:
            raise
        except Exception as error:  # whatever a file of it has made us stumble over
            log.exception("%s cannot be read", source)
            raise LoadFailed(f"{source}: cannot be read: {first_line(error)}") from error
        return spec

    def _go_back(self, reason: str) -> None:
        """To the weights it had. Raises RuntimeError(reason) where these are not there any more."""
        own = self.specs[0]
        try:
            had = read_spec(own.checkpoint.source)
        except LoadFailed:
            raise RuntimeError(reason) from None
        if had.version == own.version:
            with torch.inference_mode():
                refresh(self.model, had)
        if had.version != own.version or had.change():
            raise RuntimeError(reason)

    def fall_back(self, reason: str) -> "Loaded":
        """The same model on the padded path."""
        log.error("falling back to the padded path: %s", reason)
        self.model.backbone.prepare_padded()
        runner = PaddedRunner(self.model, self.max_batch_tokens)
        return dataclasses.replace(self, runner=runner).saying(path="padded", path_reason=reason, prefix_cache_tokens=0)

    def saying(self, **facts: Any) -> "Loaded":
        """With these in the info of every model."""
        return dataclasses.replace(self, info=self.info.saying(**facts))


def load_runner(options: NativeOptions) -> Loaded:
    """Loads, checks and sizes everything, on the thread that is to run it. Raises LoadFailed with what to do."""
    try:
        loaded = _load_runner(options)
        loader.hold_in_memory(loaded.model)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OptionsDoNotFit(
            f"{options.source}: there is too little memory on {options.device}: {first_line(error)}; free some (what "
            "else is served there takes less with a smaller --prefix-cache-mb), or give another --device"
        ) from error
    if loaded.model.backbone.device.type == "cpu":  # where it may have been a file until now
        _check_unchanged(loaded.specs)
    return loaded


def _check_unchanged(specs: Sequence[ModelSpec]) -> None:
    """Raises LoadFailed where somebody wrote to files while they were read."""
    if change := next(filter(None, (spec.change() for spec in specs)), None):
        raise LoadFailed(change)


def _load_runner(options: NativeOptions) -> Loaded:
    specs = tuple(_read_specs(options))
    device = loader.choose_device(options.device)
    use_device(device)
    if options.quantize and options.dtype not in ("auto", "bfloat16"):
        raise LoadFailed(f"quantize = {options.quantize} runs in bfloat16, not {options.dtype}; leave one of them out")
    dtype = torch.bfloat16 if options.quantize else loader.choose_dtype(options.dtype, specs[0], device)
    if device.type == "cpu":
        torch.set_num_threads(options.num_threads or num_cores())
        keep_freed_memory()
    else:
        find_place_for_kernels()
        if options.batch_invariant:
            make_batch_invariant()
    names = ", ".join(spec.checkpoint.source for spec in specs)
    log.info("loading %s (%s) as %s on %s", names, specs[0].architecture, dtype, device)
    shared = len(specs) > 1
    model = loader.load_sharing(specs, dtype, device) if shared else loader.load(specs[0], dtype, device)
    if device.type != "cpu":
        _check_unchanged(specs)
    if device.type != "cpu" and options.batch_invariant:
        model.backbone.compile_options = compile_options()
    max_batch_tokens = options.max_batch_tokens or default_batch_tokens(device.type == "cpu")
    beside_deltas = shared and any(spec.checkpoint.changes.deltas for spec in specs)
    infos = [_info(spec, options, model, dtype, device, beside_deltas) for spec in specs]
    padded = Loaded(
        PaddedRunner(model, max_batch_tokens),
        dataclasses.replace(infos[0], beside=tuple(infos[1:])),
        max_batch_tokens,
        model,
        specs,
        loader.trunks_of(specs) if shared else (0,),
    )
    if options.path == "padded":
        return padded
    try:
        return _pack(padded, options, device, dtype)
    except NotPackable as reason:
        if options.quantize:
            raise LoadFailed(
                f"{options.source}: quantize = {options.quantize} is for packed models, and {reason}"
            ) from reason
        if options.path == "packed":
            raise LoadFailed(f"{options.source}: cannot be packed: {reason}; use path = auto") from reason
        return padded.fall_back(str(reason))


def _read_specs(options: NativeOptions) -> Iterator[ModelSpec]:
    for source in (options.source, *options.beside):
        spec = read_spec(source)
        if spec.recipe.judge is not None and spec.recipe.judge.verdict is not None:
            raise LoadFailed(f"{source}: a judge that writes its verdict is served by vLLM; {HOW_TO_INSTALL}")
        yield spec


def _info(
    spec: ModelSpec,
    options: NativeOptions,
    model: RewardModel,
    dtype: torch.dtype,
    device: torch.device,
    beside_deltas: bool,
) -> EngineInfo:
    """Of one model, on the padded path. `beside_deltas`: its linear layers add what some model's adapter adds."""
    recipe, text_config = spec.recipe, spec.config.get_text_config()
    text, text_missing_reason = text_of(spec)
    # What LoRA adds to a product is rounded otherwise than what it adds to a weight: one version, one score. So is a
    # product that another's adapter keeps apart from what follows it.
    adapted = ADAPTED if beside_deltas else ""
    return EngineInfo(
        version=f"{spec.version}-{options.quantize or DTYPE_NAMES[dtype]}{adapted}",
        architecture=spec.architecture,
        path="padded",
        path_reason="asked for",
        dtype=options.quantize or str(dtype).removeprefix("torch."),
        device=str(device),
        num_parameters=model.num_parameters,
        max_length=max_length_of(spec, options.max_length),
        vocab_size=text_config.vocab_size,
        canary_error=0.0,
        prefix_cache_tokens=0,
        bos_token_id=first_id(getattr(text_config, "bos_token_id", None)),
        attributes=recipe.attributes,
        is_probability=recipe.is_probability,
        shift=0.0 if recipe.normalizer is None else recipe.normalizer.shift,
        scale=1.0 if recipe.normalizer is None else recipe.normalizer.scale,
        reads_single_states=recipe.reads.at is ReadAt.LAST,
        pattern=() if recipe.reads.pattern is None else recipe.reads.pattern.ids,
        appended=recipe.appended,
        judge=recipe.judge,
        steps=recipe.steps,
        text=text,
        text_missing_reason=text_missing_reason,
    )


def max_length_of(spec: ModelSpec, wanted: int) -> int:
    """`wanted`, as far as the checkpoint goes; 0: all of that."""
    if wanted > spec.max_length:
        log.warning(
            "max_length is %d, not %d: %s/config.json has no more positions; if the model is good for more, "
            "say so there as max_position_embeddings",
            spec.max_length,
            wanted,
            spec.folder,
        )
    return min(wanted or spec.max_length, spec.max_length)


def first_id(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def _pack(padded: Loaded, options: NativeOptions, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Moves a model from the padded to the packed path if its canary agrees. Raises NotPackable, LoadFailed."""
    tolerance = CANARY_TOLERANCE[dtype]
    check_packable(padded.model.backbone.config, padded.info.max_length)
    canary, *others = [_canary(padded.model, spec, variant) for variant, spec in enumerate(padded.specs)]
    padded.model.use(0)
    _find_packing(padded.model, canary, padded.info.max_length, tolerance)
    subject = Subject(padded.model, padded.info.num_parameters, canary, tolerance, padded.max_batch_tokens)
    speed_up(subject, options.compile, options.quantize, options.own_kernels)
    small_pool, error = canary.run(padded.model)  # as it will be served
    for variant, other in enumerate(others, start=1):
        padded.model.use(variant)
        differs_by = other.differs_by(padded.model, subject.tolerance)
        if differs_by > subject.tolerance:
            raise LoadFailed(
                f"{padded.specs[variant].folder}: over a shared backbone its hidden states differ by {differs_by:.1e} "
                "from the padded forward; --no-share-backbone loads each model by itself"
            )
        error = max(error, differs_by)
    padded.model.use(0)
    largest = (padded.max_batch_tokens, padded.info.max_length)
    captures = device.type == "cuda" and options.cuda_graphs and padded.info.num_parameters <= MAX_PARAMETERS_FOR_GRAPHS
    beside = 0
    if device.type == "cuda":
        beside = int(bytes_of_a_step(padded.model, small_pool, *largest) * (1 + captures * GRAPHS_OF_A_STEP))
    num_blocks = choose_num_blocks(options, device, small_pool.bytes_per_block, beside)
    pool = KVPool(num_blocks + (device.type != "cpu"))  # one to spare, for what a graph stores and nobody wants
    pool.allocate_like(small_pool)
    if padded.model.takes_mean:
        pool.keep_sums(padded.model.backbone.config.hidden_size, device)
    graphs = None
    if captures:
        graphs = capture(padded.model, pool, num_blocks, subject.tolerance)
    max_length = min(padded.info.max_length, (num_blocks - 2) * BLOCK_TOKENS)
    if max_length < padded.info.max_length:
        log.warning("max_length is %d, not %d: that is what the prefix cache holds", max_length, padded.info.max_length)
    host = host_blocks(options, pool, small_pool.bytes_per_block)
    if host is not None and device.type == "cuda":
        compare_host_tier(padded.model, pool, host, *largest)
    packed = dataclasses.replace(padded, runner=PackedRunner(padded.model, pool, num_blocks, graphs, host))
    return packed.saying(
        path="packed",
        path_reason="",
        max_length=max_length,
        canary_error=error,
        prefix_cache_tokens=num_blocks * BLOCK_TOKENS,
    )


def _canary(model: RewardModel, spec: ModelSpec, variant: int) -> Canary:
    model.use(variant)
    return Canary(model, spec)


def _find_packing(model: RewardModel, canary: Canary, max_length: int, tolerance: float) -> None:
    """Prepares the backbone with its last layer pruned or, where that fails its canary, whole. Raises NotPackable."""
    reason = ""
    for prune in (False,) if model.takes_mean else (True, False):
        model.backbone.prepare_packed(prune, max_length)
        try:
            error = canary.differs_by(model, tolerance)
        except torch.OutOfMemoryError:  # says nothing of the backbone
            raise
        except Exception as failure:  # a backbone that cannot be packed may fail anywhere in itself
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        else:
            if error <= tolerance:
                return
            reason = f"final hidden states differ by {error:.1e} from the padded forward"
        log.info("canary with pruning %s: %s", "on" if prune else "off", reason)
        model.backbone.prepare_padded()
    raise NotPackable(f"canary: {reason}")
