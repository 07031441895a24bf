"""The least time a workload can take, by two measures of what a machine can do."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from machine import fp8_product_rate, product_rate
from part import Part
from served import require
from work import ModelShape, Shared, attention_flops, linear_flops

ROWS = 8192  # of a linear's product: the token budget of a step


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s of each linear. With `fp8`, that is where all layers but the first and the last have theirs."""

    bf16: Mapping[str, float]
    fp8: Mapping[str, float] = field(default_factory=dict)

    def least_seconds(self, shape: ModelShape, work: Shared) -> float:
        """What a machine needs that multiplies at these rates and does nothing else; attention at that of bf16."""
        of_linears = linear_flops(shape, work)
        in_bf16 = sum(count / self.bf16[name] for name, count in of_linears.items())
        attention = attention_flops(shape, work) * in_bf16 / sum(of_linears.values())
        if not self.fp8:
            return in_bf16 + attention
        saved = 0.0
        for name, (inputs, outputs) in shape.linears.items():
            count = 2.0 * inputs * outputs * (shape.layers - 2) * work.tokens
            saved += count / self.bf16[name] - count / self.fp8[name]
        return in_bf16 - saved + attention


@dataclass(frozen=True, slots=True)
class Limits:
    """`of_machine`: one rate for all, that of a great product (8192 x 8192 x 8192); goals are set by it. `of_products`:
    what each linear's own shape reaches by itself, which is less.
    """

    shape: ModelShape
    of_machine: Rates
    of_products: Rates

    def shares(self, work: Shared, seconds: float) -> dict[str, float]:
        return {
            "share_of_limit": self.of_machine.least_seconds(self.shape, work) / seconds,
            "share_of_products": self.of_products.least_seconds(self.shape, work) / seconds,
        }


def machine_rates(part: Part, shape: ModelShape, fp8: bool = False) -> Rates:
    """Raises RuntimeError where they are not known."""
    machine = part.of("machine")
    require(f"gemm{'_fp8' if fp8 else ''}_tflops" in machine, "the machine's own rates are not known")
    bf16, in_fp8 = (dict.fromkeys(shape.linears, 1e12 * machine.get(f"gemm{kind}_tflops", 0)) for kind in ("", "_fp8"))
    return Rates(bf16, in_fp8 if fp8 else {})


def limits_of(part: Part, shape: ModelShape, fp8: bool = False) -> Limits:
    """Measures the products of the model's linears, and notes their rates. Raises RuntimeError as `machine_rates`."""
    of_machine, rows = machine_rates(part, shape, fp8), 64 if part.tiny else ROWS
    bf16 = {name: product_rate(part, rows, *sizes, 0.05) for name, sizes in shape.linears.items()}
    part.note(linear_tflops={name: rate / 1e12 for name, rate in bf16.items()})
    in_fp8: dict[str, float] = {}
    if fp8:
        in_fp8 = {name: fp8_product_rate(part, rows, *sizes, 0.05) for name, sizes in shape.linears.items()}
        part.note(linear_fp8_tflops={name: rate / 1e12 for name, rate in in_fp8.items()})
    return Limits(shape, of_machine, Rates(bf16, in_fp8))
