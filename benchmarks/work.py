"""How many tokens and FLOPs a workload needs at least, when nothing is computed twice.

Least work: every common beginning of two inputs is computed once, to the token, whichever group it is in; attention is
counted over its true causal area; and the last layer computes keys and values for all tokens, but everything else only
for the tokens that are scored. Norms, rotations and activations are not counted: they are no matrix products.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Of a decoder with grouped queries and a gated MLP."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @classmethod
    def of(cls, folder: Path) -> "ModelShape":
        """As config.json says."""
        config = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"],
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of every linear of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


@dataclass(frozen=True, slots=True)
class Shared:
    """A workload as the tree of its inputs' beginnings; a node is a token."""

    tokens: int  # nodes
    attended: int  # sum over the nodes of the tokens each attends to: those before it, and itself
    scored: int  # nodes at which an input ends
    scored_attended: int  # the same sum over those nodes


def shared(rows: Iterable[list[int]]) -> Shared:
    """`rows`: prompt + response of each input. Sorted, each adds what it does not have in common with the last."""
    ordered = [*sorted({tuple(row) for row in rows})]
    common = [0, *(_common(a, b) for a, b in pairwise(ordered))]
    return Shared(
        tokens=sum(len(row) - c for row, c in zip(ordered, common, strict=True)),
        attended=sum(_triangle(len(row)) - _triangle(c) for row, c in zip(ordered, common, strict=True)),
        scored=len(ordered),
        scored_attended=sum(map(len, ordered)),
    )


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def flops(shape: ModelShape, work: Shared) -> float:
    """Multiplications and additions of the least work."""
    return sum(linear_flops(shape, work).values()) + attention_flops(shape, work)


def linear_flops(shape: ModelShape, work: Shared) -> dict[str, float]:
    """Of each linear, over all layers. The head counts as nothing: it is one product a row."""
    return {
        name: 2.0 * inputs * outputs * ((shape.layers - 1) * work.tokens + _in_last_layer(name, work))
        for name, (inputs, outputs) in shape.linears.items()
    }


def _in_last_layer(name: str, work: Shared) -> int:
    return work.tokens if name in ("k_proj", "v_proj") else work.scored


def attention_flops(shape: ModelShape, work: Shared) -> float:
    """Queries by keys, and weights by values."""
    attended = (shape.layers - 1) * work.attended + work.scored_attended
    return 4.0 * shape.heads * shape.head_dim * attended


def least_seconds(shape: ModelShape, work: Shared, rates: Mapping[str, float]) -> float:
    """What a machine needs that multiplies at `rates` (FLOP/s of each linear) and does nothing else.

    Attention is taken at the rate of all linears together.
    """
    linear = linear_flops(shape, work)
    seconds = sum(count / rates[name] for name, count in linear.items())
    return seconds * (1 + attention_flops(shape, work) / sum(linear.values()))
