"""What the machine is, and its ceilings: a copy's bandwidth, and the rates of one great product."""

import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch
from part import Part, in_turns


def machine(part: Part) -> None:
    import transformers
    import triton

    part.note(
        name=torch.cuda.get_device_name() if part.on_gpu else "CPU",
        cpu=_cpu(),
        cores=os.cpu_count(),
        driver=_driver(),
        cuda=torch.version.cuda,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        transformers=transformers.__version__,
        numpy=np.__version__,
    )
    size = 1 << (20 if part.tiny else 31)
    source, target = (torch.empty(size, dtype=torch.uint8, device=part.device) for _ in range(2))
    part.note(copy_gb_per_s=2 * size / part.seconds(lambda: target.copy_(source)) / 1e9)
    n = 256 if part.tiny else 8192
    part.note(gemm_tflops=product_rate(part, n, n, n) / 1e12)
    try:
        part.note(gemm_fp8_tflops=fp8_product_rate(part, n, n, n) / 1e12)
        fast = fp8_product_rate(part, n, n, n, fast_sums=True)
        part.note(more={"products in fp8 with sums of fewer bits, which are not served": f"{fast / 1e12:.0f} TFLOP/s"})
    except RuntimeError as error:  # an older GPU, a CPU before torch 2.13: the part fp8 will say so too
        part.note(more={"no products in fp8": str(error).splitlines()[0]})
    part.say(f"{part.found}")


def product_rate(part: Part, rows: int, inputs: int, outputs: int, at_least: float = 0.15) -> float:
    """FLOP/s of the library's bf16 product, as a linear layer does it, by weights that are not in the GPU's cache."""
    x = torch.randn(rows, inputs, device=part.device, dtype=torch.bfloat16)
    weights = in_turns(part, lambda: torch.randn(outputs, inputs, device=part.device, dtype=torch.bfloat16))
    seconds = part.seconds(lambda: torch.nn.functional.linear(x, next(weights)), at_least)
    return 2.0 * rows * inputs * outputs / seconds


def fp8_product_rate(
    part: Part, rows: int, inputs: int, outputs: int, at_least: float = 0.15, fast_sums: bool = False
) -> float:
    """Of the rowwise product in e4m3, without what it takes to round rows to it."""
    x = torch.randn(rows, inputs, device=part.device).to(torch.float8_e4m3fn)
    weights = in_turns(part, lambda: torch.randn(outputs, inputs, device=part.device).to(torch.float8_e4m3fn))
    scales = torch.ones(rows, 1, device=part.device), torch.ones(1, outputs, device=part.device)

    def multiply() -> torch.Tensor:
        weight = next(weights).t()
        return torch._scaled_mm(
            x, weight, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=fast_sums
        )

    return 2.0 * rows * inputs * outputs / part.seconds(multiply, at_least)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _driver() -> str:
    """Of the GPU; empty where there is no way to ask."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.partition("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
