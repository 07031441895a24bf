"""A GPU where there is none: tensors that say they lie on cuda:N and are in host memory, and a torch.cuda for them.

For running the code that is for GPUs, and catching what only a GPU would complain of: tensors of two devices in one
operation, a host that waits inside a step, a copy that is not from pinned memory, a launch while another device is the
thread's own, anything a CUDA graph cannot capture. Numbers are a CPU's; Triton's kernels run under its interpreter
(TRITON_INTERPRET=1 before anything imports triton). Says nothing of speed, or of what a compiler makes of it.

A graph is what CUDA makes of it: operations and the tensors they were captured with. A replay repeats the operations on
what lies there now and leaves results where they were; no line of Python runs again.
"""

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _device
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

CAPABILITY = (9, 0)
NUM_DEVICES = 2
FREE_BYTES = 64 << 20

launches: Counter[str] = Counter()  # of operations and kernels, by name, on all threads; views count nothing
waits: Counter[str] = Counter()  # what made the host wait, by name
_thread = threading.local()
_sync_debug_mode = "default"
_pinned: dict[int, torch.Tensor] = {}  # by address; kept, so that no other memory gets the address
_real_to, _real_data_ptr = torch.Tensor.to, torch.Tensor.data_ptr

# Reads values, so that the host must wait for them.
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero", "masked_select"}
READS |= {"unique", "equal", "allclose", "__contains__", "argwhere"}
# Takes tensors of several devices.
MIXES = {"copy_", "to", "type_as", "cpu", "__getitem__", "__setitem__", "index_put_", "data", "__get__", "__set__"}
# Of the names of what computes nothing.
VIEWS = {"view", "flatten", "unflatten", "transpose", "reshape", "expand", "expand_as", "permute", "unsqueeze"}
VIEWS |= {"squeeze"}
VIEWS |= {"split", "chunk", "detach", "size", "stride", "dim", "numel", "data_ptr", "is_contiguous", "storage_offset"}
VIEWS |= {"element_size", "__len__", "requires_grad_", "untyped_storage", "unbind", "view_as", "narrow", "select"}
VIEWS |= {"is_floating_point", "is_complex", "unfold", "__get__", "new_empty", "empty_like", "__iter__", "as_subclass"}


class OnGpu(torch.Tensor):
    """In host memory. Says that it is elsewhere."""

    _device: torch.device

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _operate(func, args, dict(kwargs or {}))


def _on(tensor: torch.Tensor, device: torch.device) -> "OnGpu":
    found = _plain(tensor).detach().as_subclass(OnGpu)
    found._device = device
    return found


def _plain(value: Any) -> Any:
    if not isinstance(value, OnGpu):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _full(device: Any) -> torch.device:
    """With a number."""
    device = torch.device(device)
    if device.index is not None and device.index >= NUM_DEVICES:
        raise RuntimeError(f"CUDA error: invalid device ordinal\n{device}")
    return device if device.index is not None else torch.device("cuda", current_device())


def is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _pinned


def _waits(name: str) -> None:
    waits[name] += 1
    if _capture() is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
    if _sync_debug_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {name}")


def _operate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    own = _own_operators().get(str(func).removesuffix(".default"))
    if own is not None:  # Python behind an operator's name; what it does is looked at line by line
        return own(*args, **kwargs)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if name == "_has_compatible_shallow_copy_type":
        return False  # a module's parameter is another one on another device
    if name == "requires_grad_":
        return args[0]  # there are no gradients
    devices = {leaf.device for leaf in leaves if isinstance(leaf, OnGpu)}
    hosts = [leaf for leaf in leaves if not isinstance(leaf, OnGpu) and leaf.dim()]
    if (hosts and name not in MIXES) or len(devices) > 1:
        found = ", ".join(sorted({str(leaf.device) for leaf in leaves}))
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {found}")
    (device,) = devices
    if name in READS:
        _waits(name)
        return _call(func, args, kwargs)
    if name == "cpu" or (name == "to" and (target := _target(args[1:], kwargs)) is not None):
        return _moved(args, kwargs, torch.device("cpu") if name == "cpu" else target)
    if name == "copy_":
        _check_copy(*args[:2], kwargs.get("non_blocking", len(args) > 2 and args[2]))
    if name in ("__getitem__", "__setitem__"):
        for index in tree_leaves(args[1]):
            if isinstance(index, torch.Tensor) and (index.dtype == torch.bool or not isinstance(index, OnGpu)):
                _waits(f"{name} by {'a mask' if index.dtype == torch.bool else 'an index of the host'}")
            elif isinstance(index, list):
                _waits(f"{name} by a list")
        if name == "__setitem__" and isinstance(args[2], torch.Tensor) and not isinstance(args[2], OnGpu):
            _waits("__setitem__ of what is on the host")
    if "device" in kwargs and kwargs["device"] is not None:
        device = torch.device(kwargs.pop("device"))
        if device.type == "cpu":
            return _call(func, args, kwargs)
        device = _full(device)
    if kwargs.pop("pin_memory", False):
        raise RuntimeError("only dense CPU tensors can be pinned")
    result = _call(func, args, kwargs)
    _launched(name, func, args, kwargs, result)
    return tree_map(lambda t: _on(t, device) if isinstance(t, torch.Tensor) and not isinstance(t, OnGpu) else t, result)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map(_plain, (args, kwargs))
    if getattr(func, "__name__", "") == "histc":  # which a CPU has not for integers
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


@functools.cache
def _own_operators() -> dict[str, Callable[..., torch.Tensor]]:
    from rewardserve.models import packed_attention

    return {"rewardserve.attend": packed_attention._attend}


def _launched(name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    is_slice = name == "__getitem__" and not any(isinstance(i, torch.Tensor | list) for i in tree_leaves(args[1]))
    is_as_it_was = name == "contiguous" and _plain(args[0]).is_contiguous()
    if name not in VIEWS and not is_slice and not is_as_it_was:
        launches[name] += 1
    if (capture := _capture()) is not None and name != "__get__":
        capture.append((func, args, kwargs, result))


def _target(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """Where `to` moves a tensor; None: nowhere."""
    for value in (*args, kwargs.get("device")):
        if isinstance(value, str | torch.device):
            return torch.device(value)
        if isinstance(value, torch.Tensor):
            return value.device
    return None


def _moved(args: Any, kwargs: dict[str, Any], target: torch.device) -> torch.Tensor:
    """`to` or `cpu`, of a tensor here or there."""
    tensor, *rest = args
    dtype = next((v for v in (*rest, kwargs.get("dtype")) if isinstance(v, torch.dtype)), tensor.dtype)
    target = _full(target) if target.type == "cuda" else target
    if tensor.device == target:
        return tensor if tensor.dtype == dtype else tensor.to(dtype)
    blocking = not kwargs.get("non_blocking", False)
    if not isinstance(tensor, OnGpu):
        if blocking or not is_pinned(tensor):
            _waits("a copy to the device")
        moved = _on(_real_to(tensor, dtype, copy=True), target)
        _launched("copy to the device", _real_to, (tensor, dtype), {"copy": True}, moved)
        return moved
    if target.type == "cuda":
        return _on(_real_to(_plain(tensor), dtype, copy=True), target)
    _waits("a copy to the host")
    return _real_to(_plain(tensor), dtype, copy=True)


def _check_copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    for host in (to, source):
        if not isinstance(host, OnGpu) and (not non_blocking or not is_pinned(host)):
            _waits("copy_ between host and device")
    if isinstance(to, OnGpu) and not isinstance(source, OnGpu):
        launches["copy to the device"] += 1


# -- torch.cuda --------------------------------------------------------------------------------------------------------


def current_device() -> int:
    return getattr(_thread, "device", 0)


def _set_device(device: Any) -> None:
    _thread.device = device if isinstance(device, int) else _full(device).index


def _capture() -> list[tuple[Any, ...]] | None:
    return getattr(_thread, "capture", None)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


DEFAULT_STREAM = Stream()


class Event:
    """Not done when it is first looked at."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._device: int | None = None
        self._looks = 0

    def record(self) -> None:
        assert _current_stream() is DEFAULT_STREAM, "nothing orders what this stream does"
        self._device = current_device()

    def query(self) -> bool:
        assert self._device is not None, "it was not recorded"
        self._looks += 1
        return self._looks > 1

    def synchronize(self) -> None:
        assert self._device is not None, "it was not recorded"

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


class CUDAGraph:
    def __init__(self) -> None:
        self.operations: list[tuple[Any, ...]] = []

    @torch.inference_mode()
    def replay(self) -> None:
        launches["graph"] += 1
        for func, args, kwargs, result in self.operations:
            again = _call(func, args, kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and _real_data_ptr(_plain(old)) != _real_data_ptr(_plain(new)):
                    _plain(old).copy_(_plain(new))


@contextlib.contextmanager
def _graph(graph: CUDAGraph, pool: object = None) -> Iterator[None]:
    """If what is captured fails, the capture's stream stays the current one, as torch leaves it."""
    before = _current_stream()
    _thread.capture, _thread.stream = graph.operations, Stream()
    try:
        yield
    finally:
        _thread.capture = None
    _thread.stream = before


def _current_stream(device: Any = None) -> Stream:
    return getattr(_thread, "stream", DEFAULT_STREAM)


@contextlib.contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    before, _thread.stream = _current_stream(), stream
    try:
        yield
    finally:
        _thread.stream = before


def _set_sync_debug_mode(mode: str) -> None:
    global _sync_debug_mode
    _sync_debug_mode = mode


class Cudart:
    """Memory that is pinned where it lies."""

    @staticmethod
    def cudaHostRegister(address: int, num_bytes: int, flags: int) -> int:
        assert num_bytes > 0 and address not in _pinned
        _pinned[address] = torch.empty(0)
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:
        del _pinned[address]
        return 0


CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: NUM_DEVICES,
    "current_device": current_device,
    "set_device": _set_device,
    "get_device_capability": lambda device=None: CAPABILITY,
    "get_device_name": lambda device=None: "Pretended GPU",
    "mem_get_info": lambda device=None: (FREE_BYTES, FREE_BYTES),
    "max_memory_allocated": lambda device=None: 0,
    "synchronize": lambda device=None: None,
    "_sleep": lambda cycles: None,
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "cudart": Cudart,
    "check_error": lambda code: None,
    "memory_allocated": lambda device=None: 0,
    "set_sync_debug_mode": _set_sync_debug_mode,
    "get_sync_debug_mode": lambda: _sync_debug_mode,
    "current_stream": _current_stream,
    "graph_pool_handle": lambda: (0, 1),
    "stream": _stream,
    "graph": _graph,
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
}

# -- what makes tensors ------------------------------------------------------------------------------------------------

FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "randn", "rand", "randint", "randperm", "linspace")
_REAL = {name: getattr(torch, name) for name in FACTORIES}
_RealGenerator = torch.Generator


class Generator:
    def __init__(self, device: Any = "cpu") -> None:
        self.device, self.real = torch.device(device), _RealGenerator()

    def manual_seed(self, seed: int) -> "Generator":
        self.real.manual_seed(seed)
        return self


def _chosen() -> torch.device | None:
    """By `with torch.device(...)`."""
    modes = _get_current_function_mode_stack()
    return next((mode.device for mode in reversed(modes) if isinstance(mode, _device.DeviceContext)), None)


def _factory(name: str) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.pop("device", None) or _chosen()
        pinned, generator = kwargs.pop("pin_memory", False), kwargs.get("generator")
        if isinstance(generator, Generator):
            if generator.device.type != torch.device(device or "cpu").type:
                raise RuntimeError(f"expected a '{device}' generator, found '{generator.device}'")
            kwargs["generator"] = generator.real
        if device is not None:  # and not as `with torch.device(...)` would have it
            kwargs["device"] = "cpu" if _is_gpu(device) else device
        made = _REAL[name](*args, **kwargs)
        if pinned:
            assert not _is_gpu(device)
            _pinned[made.untyped_storage().data_ptr()] = made
        if not _is_gpu(device):
            return made
        if name in ("tensor", "randperm"):
            _waits(f"torch.{name} on the device")
        made = _on(made, _full(device))
        _launched(name, _REAL[name], args, kwargs, made)
        return made

    return make


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch.Tensor.to, of tensors on the host as well."""
    target = _target(args, kwargs)
    if isinstance(tensor, OnGpu) or target is None or target.type != "cuda":
        return _real_to(tensor, *args, **kwargs)
    return _moved((tensor, *args), kwargs, target)


_to.__name__ = "to"  # a tensor on a GPU is asked by this name


def _pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    assert not isinstance(tensor, OnGpu)
    pinned = tensor.clone()
    _pinned[pinned.untyped_storage().data_ptr()] = pinned
    return pinned


def _interpreted() -> None:
    """Triton's interpreter takes tensors on the host: launches are looked at, and handed on with those."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def looked_at(executor: Any, *args: Any, **kwargs: Any) -> None:
        name = executor.fn.__name__
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        for tensor in tensors:
            if not isinstance(tensor, OnGpu):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            if tensor.device.index != current_device():
                raise RuntimeError(f"{name}: a tensor on {tensor.device}, launched on cuda:{current_device()}")

        def run(*args: Any, **kwargs: Any) -> None:
            launch(executor, *args, **kwargs)

        _call(run, args, kwargs)
        _launched(name, run, args, kwargs, None)

    GridExecutor.__call__ = looked_at


def _bf16_is_multiplied() -> None:
    """Triton's interpreter keeps bf16 as the integers of its bits, and multiplies those. Here their values, in fp64:
    sums of their products are exact there, so that a row of the result does not depend on its place among the rows.
    In those of numpy's BLAS in fp32 it does on some CPUs, as it does not on a GPU.
    """
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if not a.dtype.is_bf16():
            return multiply(builder, a, b, d, *rest)
        product = _values_of(a.data) @ _values_of(b.data)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _values_of(bits: Any) -> Any:
    return (bits.astype("uint32") << 16).view("float32").astype("float64")


def _left_as_it_is(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Of torch.compile there is only that it is switched on: its compilers do not know these tensors."""
    module._compiled_call_impl = module._call_impl


def pretend() -> None:
    """From here on, for good: run it in a process of its own."""
    _device._device_constructors()  # it keeps the functions it finds, and looks for those called
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    for name in FACTORIES:
        setattr(torch, name, _factory(name))
    torch.Generator = Generator  # type: ignore[misc]
    torch.Tensor.to, torch.Tensor.pin_memory = _to, _pin_memory  # type: ignore[method-assign]
    torch.backends.cuda.preferred_blas_library = lambda backend=None: backend  # type: ignore[assignment]
    torch.nn.Module.compile = _left_as_it_is  # type: ignore[method-assign]
    _interpreted()
    _bf16_is_multiplied()
