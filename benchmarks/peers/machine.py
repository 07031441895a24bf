"""No provider but the machine itself: how fast it multiplies matrices of the model's own shapes.

Asked once a round, so that it has seen the same machine as everyone; each answer is a median, the best one counts.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rewardserve_kernels.cpu_code import CannotBuild
from rewardserve_kernels.linear import avx512
from torch import nn
from work import ModelShape

from peers.protocol import Groups, Job, OneProcess, Scores, serve

ROWS = (512, 1024, 2048)
SECONDS_EACH = 0.05  # of one product, repeated

Product = Callable[[], torch.Tensor]


class Machine(OneProcess):
    def load(self, job: Job) -> dict[str, str]:
        torch.set_num_threads(job.threads)
        self._device, self._dtype = job.device, getattr(torch, job.dtype)
        self._shape = ModelShape.of(Path(job.model))
        return {"torch": torch.__version__}

    @torch.inference_mode()
    def rates(self) -> dict[str, float]:
        """FLOP/s of each linear, the best over the numbers of rows and the ways: the library's and, on a CPU, ours."""
        sizes = set(self._shape.linears.values())
        rates = {size: self._rate(*size) for size in sizes}
        return {name: rates[size] for name, size in self._shape.linears.items()}

    def _rate(self, inputs: int, outputs: int) -> float:
        weight = torch.randn(outputs, inputs, device=self._device, dtype=self._dtype)
        best = 0.0
        for rows in ROWS:
            x = torch.randn(rows, inputs, device=self._device, dtype=self._dtype)
            for product in _products(x, weight):
                best = max(best, 2 * rows * inputs * outputs / self._seconds(product))
        return best

    def _seconds(self, product: Product) -> float:
        """Median of one product."""
        product()
        times, end = [], time.perf_counter() + SECONDS_EACH
        while len(times) < 3 or time.perf_counter() < end:
            started = time.perf_counter()
            product()
            if self._device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def prepare(self, groups: Groups) -> Groups:
        return groups

    def score(self, prepared: Groups) -> Scores:
        raise NotImplementedError("the machine scores nothing")


def _products(x: torch.Tensor, weight: torch.Tensor) -> list[Product]:
    ways: list[Product] = [lambda: F.linear(x, weight)]
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
        with contextlib.suppress(CannotBuild):
            avx512.load()
            linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            built = avx512.Avx512Linear(linear)
            ways.append(lambda: built(x))
    return ways


if __name__ == "__main__":
    serve(Machine())
