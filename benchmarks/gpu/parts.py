"""The parts of benchmarks/gpu/run.py, each a process: `parts.py NAME FOLDER DEVICE` writes FOLDER/result.json."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from checks import gate
from kernel_figures import kernels
from model_figures import model, variant
from part import Part


def machine(part: Part) -> None:
    import transformers
    import triton

    name = torch.cuda.get_device_name() if part.on_gpu else "CPU"
    part.note(name=name, torch=torch.__version__, triton=triton.__version__, transformers=transformers.__version__)
    size = 1 << (31 if part.on_gpu else 24)
    source, target = (torch.empty(size, dtype=torch.uint8, device=part.device) for _ in range(2))
    part.note(copy_gb_per_s=2 * size / part.seconds(lambda: target.copy_(source)) / 1e9)
    n = 8192 if part.on_gpu else 256
    a, b = (torch.randn(n, n, device=part.device, dtype=torch.bfloat16) for _ in range(2))
    part.note(gemm_tflops=2 * n**3 / part.seconds(lambda: a @ b) / 1e12)
    x, w = (t.to(torch.float8_e4m3fn) for t in (a, b))
    scale = torch.ones(n, 1, device=part.device)

    def fp8() -> torch.Tensor:
        return torch._scaled_mm(x, w.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)

    part.note(gemm_fp8_tflops=2 * n**3 / part.seconds(fp8) / 1e12)
    part.say(f"{name}: {part.found}")


PARTS: dict[str, Callable[[Part], None]] = {
    "machine": machine,
    "gate": gate,
    "kernels": kernels,
    "qwen3-0.6b": lambda part: model(part, "qwen3-0.6b", everything=True),
    "qwen3-4b": lambda part: model(part, "qwen3-4b", everything=False),
    "llama-3.1-8b": lambda part: model(part, "llama-3.1-8b", everything=False),
    "qwen3-0.6b variant": lambda part: variant(part, "qwen3-0.6b", batch_invariant=False),
    "llama-3.1-8b fp8": lambda part: variant(part, "llama-3.1-8b", quantize="fp8"),
}


if __name__ == "__main__":
    PARTS[sys.argv[1]](Part(Path(sys.argv[2]), sys.argv[3]))
