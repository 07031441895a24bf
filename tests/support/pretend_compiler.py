"""torch.compile for an H200 that is not there: dynamo and inductor do what they would do for it, Triton compiles for
its instructions, and nothing is launched. Tensors are fake: shapes, strides and the device's name.

What is left out is what asks the device for numbers: patterns that inductor tries out on it, constants that it folds
there, and the clock that chooses among several configurations of a kernel (the first one wins). It is so for good, so
it is for a process of its own. Says nothing of speed, or of what a kernel computes.
"""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._C._dynamo.guards as guards
import torch._inductor.config as inductor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import lowering  # noqa: F401  # which names the products
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.benchmarking import benchmarker
from torch._inductor.select_algorithm import extern_kernels
from torch._subclasses import fake_tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    warp_size=32,
    L2_cache_size=60 << 20,
    gcnArchName="",
)
LAUNCHES = re.compile(r"(triton_\w+)\.run\(|(?:extern_kernels|aten|rewardserve)\.(\w+?)(?:\.\w+)?\(")

kernels: list[str] = []  # Triton's, as they are compiled, once for each configuration that the clock would choose among
graphs: list[str] = []  # the code that launches them, graph by graph


def sums(kernel: str) -> bool:
    """Whether the order of a sum is a matter of its configuration."""
    return kernel.startswith(("triton_red", "triton_per"))


def launches(graph: str) -> list[str]:
    """What `graph`, one of `graphs`, launches, in its order: kernels of Triton, products, operators."""
    body = graph[graph.index("def call") :].replace("torch.ops.", "")
    return [ours or theirs for ours, theirs in LAUNCHES.findall(body) if not theirs.startswith("empty")]


def pretend() -> None:
    _pretend_device()
    _pretend_compilers()
    _pretend_runtime()


def put_there(module: torch.nn.Module) -> None:
    """Parameters and buffers of `module`. Inside a FakeTensorMode."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    is_parameter = tensors is part._parameters
                    tensors[name] = torch.nn.Parameter(there, requires_grad=False) if is_parameter else there


def _pretend_device() -> None:
    cuda: Any = torch.cuda
    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1, device=torch.device("cuda", 0))
    answers = dict.fromkeys(("_lazy_init", "synchronize", "set_device", "set_rng_state"))
    answers |= dict.fromkeys(("current_device", "get_raw_stream", "exchange_device", "maybe_exchange_device"), 0)
    answers |= dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0)
    answers |= dict.fromkeys(("current_stream", "default_stream"), stream)
    answers |= {"is_available": True, "is_initialized": True, "device_count": 1, "get_device_properties": H200}
    answers |= {"get_device_capability": (H200.major, H200.minor), "get_rng_state": torch.zeros(16, dtype=torch.uint8)}
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer: answer)  # each its own function: dynamo tells them apart
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer: answer))
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    torch.accelerator.is_available = lambda: False
    fake_tensor.init_gpu_context = _nothing  # type: ignore[assignment]
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    if not torch.backends.cuda.is_built():  # then torch's own indexing asks for a device's guard that is not there
        for kind in (fake_tensor.FakeTensor, FunctionalTensor):
            kind.__getitem__, kind.__setitem__ = _get_item, _set_item  # type: ignore[method-assign,assignment]


def _pretend_compilers() -> None:
    inductor.compile_threads = 1
    inductor.fx_graph_cache = False
    inductor.joint_graph_constant_folding = False
    torch._functorch.config.enable_autograd_cache = False
    for switch in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(inductor, switch):
            setattr(inductor, switch, False)
    fuse_attention._sfdp_init = misc_patterns._misc_patterns_init = pad_mm._pad_mm_init = _nothing  # type: ignore
    triton_helpers.set_driver_to_gpu = _nothing  # type: ignore[assignment]
    driver.set_active(_Driver())
    write = PyCodeCache.write.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, source_code: str, *args: Any, **kwargs: Any) -> Any:
        if "def call" in source_code:
            graphs.append(source_code)
        return write(cls, source_code, *args, **kwargs)

    PyCodeCache.write = classmethod(noted)  # type: ignore[method-assign,assignment]


def _pretend_runtime() -> None:
    triton_heuristics.TritonCompileResult.make_launcher = _launcher  # type: ignore[method-assign,assignment]
    benchmarker.benchmark_gpu = lambda *_, **__: 1.0  # type: ignore[method-assign,assignment]
    for name, product in list(vars(extern_kernels).items()):
        setattr(extern_kernels, name, _in_place(product))
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: tensor.as_strided(
        size, stride, tensor.storage_offset() + offset
    )


def _launcher(result: Any) -> Callable[..., None]:
    kernels.append(result.kernel.metadata.name)
    launcher: Any = lambda *_, **__: None  # noqa: E731
    launcher.config, launcher.cache_hash, launcher.store_cubin = result.config, "", False
    launcher.n_regs = launcher.n_spills = launcher.shared = 0
    return launcher


def _in_place(product: Callable[..., Any]) -> Callable[..., Any]:
    """Not all of them know what comes out if it is given where to."""
    return lambda *args, out=None, **kwargs: product(*args, **kwargs) if out is None else out


class _Driver:
    """Triton's, which knows what to compile for and cannot load it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * H200.major + H200.minor, H200.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def _nothing(*_: Any, **__: Any) -> None: ...


def _get_item(self: torch.Tensor, index: Any) -> torch.Tensor:
    found, tensors = _sliced(self, index)
    return torch.ops.aten.index(found, tensors) if tensors else found


def _set_item(self: torch.Tensor, index: Any, value: Any) -> None:
    found, tensors = _sliced(self, index)
    if tensors:
        torch.ops.aten.index_put_(found, tensors, torch.as_tensor(value, dtype=self.dtype, device=self.device))
    else:
        found.copy_(value)


def _sliced(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """By all of `index` but its tensors, and those by their dimension."""
    parts = list(index) if isinstance(index, tuple) else [index]
    at = next((n for n, part in enumerate(parts) if part is Ellipsis), len(parts))
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    parts[at : at + 1] = [slice(None)] * (tensor.dim() - taken)
    dim, tensors = 0, dict[int, torch.Tensor]()
    for part in parts:
        if part is None:
            tensor, dim = torch.ops.aten.unsqueeze(tensor, dim), dim + 1
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
            dim += 1
        elif isinstance(part, torch.Tensor):
            tensors[dim], dim = part, dim + 1
        else:
            tensor = torch.ops.aten.select(tensor, dim, part)
    return tensor, [tensors.get(n) for n in range(max(tensors) + 1)] if tensors else []
