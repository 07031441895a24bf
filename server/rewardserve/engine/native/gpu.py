"""How a process, and each of its threads, is set up for its GPU, before its first product."""

import os

import torch
import torch._inductor.config as inductor


def use_device(device: torch.device) -> None:
    """Makes it the calling thread's own, which another is not: streams and events, Triton's launches and captures are
    of the thread's device, whichever one the tensors lie on. Without a number it is the first one, as it is anyway.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def make_batch_invariant() -> None:
    """A row of a matrix product shall not depend on how many rows there are.

    On Hopper the one thing it depends on is split-K: for few rows cuBLAS splits the sum among several blocks, and adds
    up in another order. It needs a workspace for that and is given none, as vLLM does it (its batch_invariant.py). That
    it costs nothing from some 2,000 rows on is a prediction (benchmarks/NOTES.md); of other GPUs nothing is known. That
    norms see rows enough is seen to in batch.py.

    Nor shall a compiled sum depend on what was faster when it was compiled: another process would find another order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "1")
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]  # nor split-K
    matmul.allow_fp16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]
    if hasattr(inductor, "deterministic"):  # from torch 2.10 on
        inductor.deterministic = True
