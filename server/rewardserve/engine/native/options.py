"""How a native engine is to load and run a model. Plain data: it crosses to the engine's process as it is."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class NativeOptions:
    engine: ClassVar[str] = "native"  # whose these are; engine/child.py runs it

    source: str  # local folder or hub name
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    max_length: int = 0  # tokens; 0: as the checkpoint says, as far as the prefix cache reaches
    max_batch_tokens: int = 0  # 0: 4096 on a CPU, 8192 on a GPU
    max_batch_sequences: int = 512
    prefix_cache_bytes: int = 0  # 0: a tenth of free memory, 4 GiB at most, on a CPU; six tenths on a GPU
    host_cache_bytes: int = 0  # of prompts that left the prefix cache
    batch_invariant: bool = True  # on a GPU; on a CPU bf16 is so anyway
    cuda_graphs: bool = True  # for forwards of few tokens, on a GPU
    own_kernels: bool = True  # False: torch's operations in their place, slowly
    compile: str = "auto"  # auto (where it works and pays), on, off
    quantize: str = ""  # "int8", "fp8": 8-bit weights and activations; dtype is then that of what lies between
    path: str = "auto"  # auto, packed (refuse what is not), padded
    num_threads: int = 0  # of torch on a CPU; 0: as many as there are cores
    beside: tuple[str, ...] = ()  # adapters of the same base as `source`, served over one backbone with it
