"""One thing at a time as it was before it was made fast, in an engine that is idle."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from rewardserve.engine.native.engine import NativeEngine
from rewardserve.models.backbone import Backbone
from rewardserve_kernels.attention import chunked
from rewardserve_kernels.kv_cache import paged
from served import loaded_of


@contextlib.contextmanager
def graphs_off(engine: NativeEngine, off: bool = True) -> Iterator[None]:
    runner: Any = loaded_of(engine).runner
    graphs = runner._graphs
    runner._graphs = None if off else graphs
    try:
        yield
    finally:
        runner._graphs = graphs


@contextlib.contextmanager
def _changed(engine: NativeEngine, of: str, to: object) -> Iterator[None]:
    backbone: Any = _backbone(engine)
    before = getattr(backbone, of)
    with graphs_off(engine):  # what was captured is as it was
        setattr(backbone, of, to)
        try:
            yield
        finally:
            setattr(backbone, of, before)


@contextlib.contextmanager
def _uncompiled(engine: NativeEngine) -> Iterator[None]:
    layers = [getattr(layer, "layer", layer) for layer in _backbone(engine).decoder_layers]  # the last one is wrapped
    compiled = [layer._compiled_call_impl for layer in layers]
    with graphs_off(engine):
        _backbone(engine).set_compiled(False)
        try:
            yield
        finally:
            for layer, call in zip(layers, compiled, strict=True):
                layer._compiled_call_impl = call


@contextlib.contextmanager
def _unpruned(engine: NativeEngine) -> Iterator[None]:
    layers: Any = _backbone(engine)._layers
    wrapped = layers[-1]
    with _changed(engine, "_pruned", False):
        layers[-1] = getattr(wrapped, "layer", wrapped)
        try:
            yield
        finally:
            layers[-1] = wrapped


def _backbone(engine: NativeEngine) -> Backbone:
    return loaded_of(engine).model.backbone


WAYS: dict[str, Callable[[NativeEngine], AbstractContextManager[None]]] = {
    "layers not compiled": _uncompiled,
    "the last layer whole": _unpruned,
    "keys and values stored by torch": lambda engine: _changed(engine, "store_rows", paged.store_rows),
    "attention by torch's products": lambda engine: _changed(engine, "attention", chunked),
}
