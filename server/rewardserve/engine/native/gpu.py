"""How a process, and each of its threads, is set up for its GPU, before its first product."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor

log = logging.getLogger(__name__)

KERNELS = "TRITON_CACHE_DIR"


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
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "1")
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]  # nor split-K
    matmul.allow_fp16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]


def compile_options() -> dict[str, Any]:
    """Of torch.compile, for what it compiles not to depend on what was faster when it was compiled: another process
    would add up in another order.

    Not by the module's own `deterministic`: every trace of torch.compile ends in a use_deterministic_algorithms(False),
    as it found it, and that switches it off for all that is compiled after it (seen in 2.11 and 2.13).
    """
    return {"deterministic": True} if hasattr(inductor, "deterministic") else {}  # from torch 2.10 on


def find_place_for_kernels() -> None:
    """Triton keeps what it compiles below the user's home, and compiles nothing where it cannot: in a container that is
    often read-only, or the user is one without a home. Then below the folder for temporary files.
    """
    if KERNELS in os.environ or "TRITON_HOME" in os.environ or _is_ours(Path(os.path.expanduser("~"), ".triton")):
        return
    folder = Path(tempfile.gettempdir(), f"rewardserve-triton-{os.getuid()}")  # which the next process finds too
    os.environ[KERNELS] = str(folder) if _is_ours(folder) else tempfile.mkdtemp(prefix="rewardserve-triton-")
    log.info("kernels are kept in %s: the home cannot be written to", os.environ[KERNELS])


def _is_ours(folder: Path) -> bool:
    """Whether it can be written to, by this user; it is made where it is not there."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False
