"""Which engine serves a checkpoint: decided here, and nowhere else.

What only one engine can do names that engine. Where nothing does, the native engine is tried first, for it is exact and
shares prompts; a checkpoint that it cannot load vLLM is given, if it is installed. Options that are too much for the
device are no such case: what to do about them is said. Loads neither.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

from rewardserve.engine.base import Engine, EngineInfo, EngineListener, EngineRequest, EngineResult
from rewardserve.errors import LoadFailed, OptionsDoNotFit, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the server's options say about it."""

    engine: str = "auto"  # auto, native, vllm
    tensor_parallel: int = 1
    vllm_quantization: str = ""
    of_native: bool = False  # something that the native engine alone would heed


def choose(wish: Wish, native: Callable[[], Engine], vllm: Callable[[str], Engine]) -> Engine:
    """`vllm` is given the reason for it, which is shown with the model."""
    if reason := reason_for_vllm(wish):
        return vllm(reason)
    if wish.engine == "native" or wish.of_native:
        return native()
    return NativeElseVllm(native(), vllm)


def reason_for_vllm(wish: Wish) -> str:
    """Why it must be vLLM; empty where the native engine is tried first, or is what must be."""
    if wish.engine == "vllm":
        return "asked for"
    if wish.engine == "native" or wish.of_native:
        return ""
    if wish.tensor_parallel > 1:
        return f"tensor_parallel = {wish.tensor_parallel}"
    return f"vllm_quantization = {wish.vllm_quantization}" if wish.vllm_quantization else ""


def is_vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


class NativeElseVllm:
    """The Engine protocol: the native engine or, for a checkpoint that it cannot load, vLLM."""

    def __init__(
        self, native: Engine, vllm: Callable[[str], Engine], is_installed: Callable[[], bool] = is_vllm_installed
    ) -> None:
        self._engine = native
        self._vllm = vllm
        self._is_installed = is_installed
        self._stopped = False

    async def start(self, listener: EngineListener) -> EngineInfo:
        try:
            return await self._engine.start(listener)
        except LoadFailed as refusal:
            await self._engine.stop()
            if self._stopped or isinstance(refusal, OptionsDoNotFit) or not self._is_installed():
                raise
            log.warning("the native engine cannot load it, trying vLLM: %s", refusal)
            self._engine = self._vllm(f"the native engine cannot load it: {refusal}")
            return await self._start_vllm(self._engine, listener, refusal)

    async def _start_vllm(self, engine: Engine, listener: EngineListener, refusal: LoadFailed) -> EngineInfo:
        try:
            return await engine.start(listener)
        except LoadFailed as error:
            if str(error) == str(refusal):  # what is wrong is the checkpoint
                raise
            raise LoadFailed(f"{refusal}; nor can vLLM: {error}") from error

    async def score(self, request: EngineRequest) -> EngineResult:
        if self._stopped:
            raise Unavailable("the engine was stopped")
        return await self._engine.score(request)

    async def update_weights(self, source: str) -> EngineInfo:
        if self._stopped:
            raise Unavailable("the engine was stopped")
        return await self._engine.update_weights(source)

    async def stop(self) -> None:
        self._stopped = True
        await self._engine.stop()
