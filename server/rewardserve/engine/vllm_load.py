"""Options -> vLLM with the model loaded and tried, and what to tell the world about it.

The only file that imports vLLM, and it runs in the engine's process only (child.py).
"""

import abc
import asyncio
import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import tokenizers
import torch

from rewardserve.engine.base import EngineInfo
from rewardserve.engine.judge import Unreadable, read_verdict
from rewardserve.engine.native.load import DTYPE_NAMES, first_id, max_length_of
from rewardserve.engine.native.sizing import auto_cache_bytes, default_batch_tokens
from rewardserve.engine.vllm_engine import ItemFailed, ModelGone, Scored, Step
from rewardserve.engine.vllm_options import HOW_TO_INSTALL, VllmOptions
from rewardserve.engine.vllm_plugin import OWNER
from rewardserve.errors import LoadFailed
from rewardserve.models.checkpoint import first_line
from rewardserve.models.heads import LinearHead
from rewardserve.models.loader import choose_dtype, count_parameters
from rewardserve.models.reads import ReadPlan
from rewardserve.models.spec import ModelSpec, read_spec
from rewardserve.models.text_export import export_text
from rewardserve.types import ItemCode, ItemFailure, VerdictFormat

log = logging.getLogger(__name__)

COMPILE_FROM_PARAMETERS = 50_000_000
PIPE_S = 0.5  # what a process said last may be on its way here when its death is known
# The exception in a line of a traceback or a log: its kind, and what it says.
EXCEPTION = re.compile(r"^(?:\([^)]*\) )?(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.+)")


class VllmModel(abc.ABC):
    """A model in vLLM's processes, spoken to from the event loop it was loaded on."""

    def __init__(self, llm: Any, info: EngineInfo, max_batch_tokens: int, max_batch_sequences: int) -> None:
        self.info = info
        self.max_batch_tokens, self.max_batch_sequences = max_batch_tokens, max_batch_sequences
        self._llm = llm

    @abc.abstractmethod
    async def score(self, item_id: str, token_ids: list[int], priority: int) -> Scored:
        """Raises ItemFailed or ModelGone. Cancelling it aborts the item, wherever it is."""

    async def _last_of(self, outputs: AsyncIterator[Any]) -> Any:
        """Raises ItemFailed or ModelGone."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        output = None
        try:
            async for answer in outputs:
                output = answer
        except VLLMClientError as error:
            raise ItemFailed(ItemFailure(ItemCode.INVALID_ARGUMENT, f"vLLM refuses it: {first_line(error)}")) from error
        except EngineDeadError as error:
            raise ModelGone("vLLM's engine core has died; its log says why") from error
        except EngineGenerateError as error:
            reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            raise ItemFailed(ItemFailure(ItemCode.INTERNAL, f"the forward failed: {reason}")) from error
        flaw = None if output is None else getattr(output, "error", None)
        if output is None or flaw is not None:
            reason = "vLLM gave no answer" if flaw is None else flaw.message
            raise ItemFailed(ItemFailure(ItemCode.INTERNAL, f"the forward failed: {reason}"))
        return output

    async def ping(self) -> None:
        await self._llm.is_sleeping()  # the engine core is asked, which looks for questions between its steps

    @property
    def is_gone(self) -> bool:
        return bool(self._llm.errored)


class Classifier(VllmModel):
    async def score(self, item_id: str, token_ids: list[int], priority: int) -> Scored:
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        raw = PoolingParams(task="classify", use_activation=False)
        # Lower is first with vLLM, higher is first with us.
        output = await self._last_of(self._llm.encode(tokens_input(token_ids), raw, item_id, priority=-priority))
        values = output.outputs.data.flatten().tolist()
        if len(values) != 1:
            raise ItemFailed(ItemFailure(ItemCode.INTERNAL, f"vLLM gave {len(values)} values instead of one score"))
        return Scored(values[0], output.num_cached_tokens)


class WritingJudge(VllmModel):
    """Writes what is likeliest, token by token, so that the same question has the same verdict."""

    def __init__(
        self,
        llm: Any,
        info: EngineInfo,
        max_batch_tokens: int,
        max_batch_sequences: int,
        verdict: VerdictFormat,
        tokenizer: tokenizers.Tokenizer,
        ends: Sequence[int],
    ) -> None:
        """`ends`: ids that end what it writes."""
        super().__init__(llm, info, max_batch_tokens, max_batch_sequences)
        self._verdict, self._tokenizer, self._ends = verdict, tokenizer, list(ends)

    async def score(self, item_id: str, token_ids: list[int], priority: int) -> Scored:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=self._verdict.max_tokens,
            stop_token_ids=self._ends,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._last_of(self._llm.generate(tokens_input(token_ids), greedy, item_id, priority=-priority))
        written = output.outputs[0]
        try:
            if written.finish_reason not in ("stop", "length"):  # it was cut off: what is there may end in a verdict
                raise ItemFailed(ItemFailure(ItemCode.INTERNAL, f"vLLM ended it: {written.finish_reason}"))
            if written.finish_reason == "length":
                raise Unreadable(f"it came to no end within max_tokens = {self._verdict.max_tokens}")
            verdict = read_verdict(self._tokenizer.decode(list(written.token_ids)), self._verdict)
        except Unreadable as error:
            message = f"the judge's verdict cannot be read: {error}"
            raise ItemFailed(ItemFailure(ItemCode.INTERNAL, message, is_of_the_score=True)) from error
        return Scored(verdict.score, output.num_cached_tokens or 0, verdict.criteria)


async def load(options: VllmOptions, on_step: Callable[[Step], None]) -> VllmModel:
    """Loads, tries and sizes everything. Raises LoadFailed with what to do about it."""
    if importlib.util.find_spec("vllm") is None:
        raise LoadFailed(f"{options.source}: engine = vllm, but vLLM is not installed; {HOW_TO_INSTALL}")
    spec = read_spec(options.source, any_quantization=True)
    _check_head(options, spec)
    num_parameters = _check_weights(spec)
    _set_environment(options)
    with _overheard() as reasons:
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
            reason = next(iter(reasons), first_line(error))
            raise LoadFailed(f"{options.source}: vLLM cannot serve it: {reason}{_in_our_words(reason)}") from error
    return model


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


def _check_weights(spec: ModelSpec) -> int:
    """How many parameters there are. vLLM itself starts with whatever was in memory where a weight is missing."""
    if not spec.is_quantized:
        return count_parameters(spec)
    log.warning("%s is quantized: whether weights are missing is left to vLLM to notice", spec.folder)
    return sum(math.prod(spec.checkpoint.shape(key)) for key in spec.checkpoint.where)


def _set_environment(options: VllmOptions) -> None:
    """vLLM and the processes it starts read these when they are imported."""
    os.environ[OWNER] = str(os.getpid())
    if not any(plugin.name == "rewardserve" for plugin in entry_points(group="vllm.general_plugins")):
        log.warning("rewardserve is not installed but on the path: a score that is not a number may spread to others")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # its log lines are ours, then
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process has threads, which a fork would cut off
    os.environ["HF_HUB_OFFLINE"] = "1"  # all there is to load lies in a local folder by now
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and it would win over kv_cache_memory_bytes
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _binding(options)
    if options.device.startswith("cuda:"):
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible_gpu(int(options.device.removeprefix("cuda:")))


def _visible_gpu(number: int) -> str:
    """cuda:1 is the second of those that are visible, whatever they are called."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else []
    if visible and number >= len(names):
        raise LoadFailed(f"device = cuda:{number}, but CUDA_VISIBLE_DEVICES={visible} leaves {len(names)}")
    return names[number] if visible else str(number)


def _binding(options: VllmOptions) -> str:
    """Cores for each rank, where the engine has them all; some of them are not bound, or two engines would share."""
    cores = sorted(os.sched_getaffinity(0))
    ranks = options.tensor_parallel
    if options.num_threads not in (0, len(cores)) or len(cores) < ranks:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (options.num_threads or len(cores)) // ranks))
        return "nobind"
    size = len(cores) // ranks
    return "|".join(",".join(map(str, cores[rank * size : (rank + 1) * size])) for rank in range(ranks))


def _start(options: VllmOptions, spec: ModelSpec, num_parameters: int, on_step: Callable[[Step], None]) -> VllmModel:
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    device = current_platform.device_type
    if options.device != "auto" and not options.device.startswith(device):
        raise LoadFailed(f"device = {options.device}, but the vLLM that is installed is for {device}; {HOW_TO_INSTALL}")
    on_cpu = device == "cpu"
    max_batch_tokens = options.max_batch_tokens or default_batch_tokens(on_cpu)
    verdict, max_length = _verdict(spec), max_length_of(spec, options.max_length)
    _check_room(spec, max_length)
    compiled = options.compile == "on" or (options.compile == "auto" and num_parameters >= COMPILE_FROM_PARAMETERS)
    # By word, always: a file of another library's beside the checkpoint may say otherwise.
    last = PoolerConfig(task="classify", seq_pooling_type="LAST", use_activation=False)
    arguments = AsyncEngineArgs(
        model=str(spec.folder),
        config_format="hf",
        load_format="hf",
        runner="pooling" if verdict is None else "generate",
        pooler_config=last if verdict is None else None,
        hf_overrides={"num_labels": 1, "head_dtype": "float32"} if verdict is None else {},
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
    log.info("loading %s (%s) into %s", options.source, spec.architecture, _vllm_version())
    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    config.model_config.original_max_model_len = -1  # makes it take fewer tokens where its cache does not hold so many
    llm = AsyncLLM.from_vllm_config(
        config,
        stat_loggers=[lambda config, index=0: _Listener(on_step)],
        enable_log_requests=False,
        disable_log_stats=True,  # but for what listens
    )
    if config.model_config.max_model_len < max_length:
        log.warning(
            "max_length is %d, not %d: that is what the prefix cache holds",
            config.model_config.max_model_len,
            max_length,
        )
    _check_room(spec, config.model_config.max_model_len)
    info = _info(options, spec, num_parameters, llm)
    if verdict is None:
        return Classifier(llm, info, max_batch_tokens, arguments.max_num_seqs)
    assert info.text is not None
    tokenizer = tokenizers.Tokenizer.from_str(info.text.tokenizer_json)
    return WritingJudge(llm, info, max_batch_tokens, arguments.max_num_seqs, verdict, tokenizer, _ends(spec, tokenizer))


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
        named = json.loads((spec.checkpoint.text_folder / "tokenizer_config.json").read_text()).get("eos_token")
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
    text, text_missing_reason = export_text(spec.checkpoint.text_folder)
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


@contextlib.contextmanager
def _overheard() -> Iterator[list[str]]:
    """The exceptions that the processes vLLM starts say on stderr, in the order they come: they are said there only.

    All is passed on as it comes, also after the block, for as long as they live.
    """
    reasons: list[str] = []
    loading = threading.Event()
    loading.set()
    reader, writer = os.pipe()
    stderr = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)

    def pass_on() -> None:
        with os.fdopen(reader, "rb") as lines:
            for line in lines:
                os.write(stderr, line)
                if loading.is_set() and (match := EXCEPTION.match(line.decode(errors="replace").rstrip())):
                    reasons.append(f"{match[1]}: {match[2][:500]}")

    threading.Thread(target=pass_on, name="stderr of vLLM", daemon=True).start()
    try:
        yield reasons
    finally:
        loading.clear()
        os.dup2(stderr, 2)
