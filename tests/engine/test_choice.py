"""Which engine serves a checkpoint."""

import asyncio
import dataclasses

import pytest
from rewardserve.engine.base import EngineListener
from rewardserve.engine.choice import NativeElseVllm, Wish, choose
from rewardserve.engine.fake import FakeEngine, fake_info
from rewardserve.errors import LoadFailed, OptionsDoNotFit

INFO = fake_info()


class Refusing(FakeEngine):
    def __init__(self, reason: str, kind: type[LoadFailed] = LoadFailed) -> None:
        super().__init__(INFO)
        self.reason, self.kind, self.stopped = reason, kind, False
        self.may_refuse = asyncio.Event()
        self.may_refuse.set()

    async def start(self, listener):
        await self.may_refuse.wait()
        raise self.kind(self.reason)

    async def stop(self):
        self.stopped = True


def vllm(reason: str) -> FakeEngine:
    return FakeEngine(dataclasses.replace(INFO, path="vllm", path_reason=reason))


@pytest.mark.parametrize(
    ("wish", "path", "reason"),
    [
        (Wish(), "packed", ""),
        (Wish("native"), "packed", ""),
        (Wish("vllm"), "vllm", "asked for"),
        (Wish(tensor_parallel=2), "vllm", "tensor_parallel = 2"),
        (Wish(vllm_quantization="fp8"), "vllm", "vllm_quantization = fp8"),
        (Wish(of_native=True), "packed", ""),
    ],
)
async def test_what_only_one_can_do_names_it_and_else_the_native_one_is_first(wish, path, reason):
    info = await choose(wish, lambda: FakeEngine(INFO), vllm).start(EngineListener())
    assert (info.path, info.path_reason) == (path, reason)


async def test_what_the_native_engine_cannot_load_vllm_is_given_and_says_why():
    native = Refusing("weights of kind x")
    engine = NativeElseVllm(native, vllm, is_installed=lambda: True)
    info = await engine.start(EngineListener())
    assert info.path == "vllm" and info.path_reason == "the native engine cannot load it: weights of kind x"
    assert native.stopped
    await engine.stop()


async def test_without_vllm_the_native_refusal_stands_as_it_is():
    with pytest.raises(LoadFailed, match=r"^weights of kind x$"):
        await NativeElseVllm(Refusing("weights of kind x"), vllm, is_installed=lambda: False).start(EngineListener())


@pytest.mark.parametrize(
    ("theirs", "said"),
    [("no folder", "no folder"), ("no kernel", "no folder; nor can vLLM: no kernel")],
    ids=["the same", "another"],
)
async def test_where_neither_can_both_reasons_are_said_once(theirs, said):
    engine = NativeElseVllm(Refusing("no folder"), lambda reason: Refusing(theirs), is_installed=lambda: True)
    with pytest.raises(LoadFailed) as caught:
        await engine.start(EngineListener())
    assert str(caught.value) == said


@pytest.mark.parametrize("wish", [Wish("native"), Wish(of_native=True)], ids=["by name", "by what it alone heeds"])
async def test_a_named_native_engine_has_no_fallback(wish):
    with pytest.raises(LoadFailed, match="no folder"):
        await choose(wish, lambda: Refusing("no folder"), vllm).start(EngineListener())


async def test_options_that_are_too_much_are_said_and_do_not_bring_another_engine():
    native = Refusing("give --prefix-cache-mb 40", OptionsDoNotFit)
    with pytest.raises(OptionsDoNotFit, match=r"^give --prefix-cache-mb 40$"):
        await NativeElseVllm(native, vllm, is_installed=lambda: True).start(EngineListener())


async def test_one_that_is_stopped_while_it_loads_is_not_loaded_by_another_engine():
    native, others = Refusing("weights of kind x"), []
    native.may_refuse.clear()
    engine = NativeElseVllm(native, others.append, is_installed=lambda: True)
    start = asyncio.create_task(engine.start(EngineListener()))
    await asyncio.sleep(0)
    await engine.stop()
    assert native.stopped
    native.may_refuse.set()
    with pytest.raises(LoadFailed, match="kind x"):
        await start
    assert not others
