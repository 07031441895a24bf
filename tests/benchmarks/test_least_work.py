"""The limit's arithmetic, against counting by hand and against torch's own counter."""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, Qwen3Config
from work import ModelShape, attention_flops, flops, least_seconds, linear_flops, shared

TINY = ModelShape(hidden=24, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate=40)


def random_rows(seed: int) -> list[list[int]]:
    """Few different ids, so that much is in common; some rows are equal, some a beginning of another."""
    rng = random.Random(seed)
    rows = [rng.choices(range(2), k=rng.randint(1, 12)) for _ in range(20)]
    return [*rows, rows[0], rows[1] + [1, 1]]


def beginnings(rows: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(row[: end + 1]) for row in rows for end in range(len(row))}


@pytest.mark.parametrize("seed", range(20))
def test_every_common_beginning_counts_once(seed: int) -> None:
    rows = random_rows(seed)
    nodes = beginnings(rows)
    work = shared(rows)
    assert work.tokens == len(nodes)
    assert work.attended == sum(map(len, nodes))
    assert work.scored == len({tuple(row) for row in rows})
    assert work.scored_attended == sum(map(len, {tuple(row) for row in rows}))


def test_a_system_prompt_is_shared_across_prompts() -> None:
    system = list(range(100, 150))
    rows = [system + [prompt] * 10 + [prompt, response] for prompt in range(3) for response in range(20, 24)]
    assert shared(rows).tokens == 50 + 3 * 11 + 12


@pytest.mark.parametrize("seed", range(5))
def test_flops_are_those_of_every_product_counted_one_by_one(seed: int) -> None:
    """Layer by layer, node by node, key by key."""
    rows = random_rows(seed)
    scored = {tuple(row) for row in rows}
    count = 0
    for layer in range(TINY.layers):
        for node in beginnings(rows):
            computed = layer < TINY.layers - 1 or node in scored
            for name, (inputs, outputs) in TINY.linears.items():
                if computed or name in ("k_proj", "v_proj"):
                    count += 2 * inputs * outputs
            for _ in node if computed else ():
                count += 2 * 2 * TINY.heads * TINY.head_dim
    assert flops(TINY, shared(rows)) == count


def test_linear_flops_are_what_torch_counts() -> None:
    """A single row shares nothing; of the last layer torch counts all, and so do we once its pruning is undone."""
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=TINY.hidden,
        num_hidden_layers=TINY.layers,
        intermediate_size=TINY.intermediate,
        num_attention_heads=TINY.heads,
        num_key_value_heads=TINY.kv_heads,
        head_dim=TINY.head_dim,
        num_labels=1,
        attn_implementation="eager",
    )
    model = AutoModelForSequenceClassification.from_config(config).model.eval()
    row = list(range(16))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([row]), use_cache=False)
    by_operation = counter.get_flop_counts()["Global"]
    work = shared([row])
    pruned = sum(2 * a * b for name, (a, b) in TINY.linears.items() if name not in ("k_proj", "v_proj"))
    assert by_operation[torch.ops.aten.mm] - pruned * (len(row) - 1) == sum(linear_flops(TINY, work).values())
    whole_square = 4 * TINY.heads * TINY.head_dim * TINY.layers * len(row) ** 2
    assert by_operation[torch.ops.aten.bmm] >= whole_square > attention_flops(TINY, work)


def test_the_limit_is_the_flops_at_the_machines_rate() -> None:
    work = shared(random_rows(0))
    assert least_seconds(TINY, work, dict.fromkeys(TINY.linears, 1e9)) == pytest.approx(flops(TINY, work) / 1e9)
