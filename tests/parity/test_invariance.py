"""One pair, one score, bit for bit (bf16 on a CPU), whatever is around it and whatever was cached."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import make_tokenizer, save_checkpoint
from scoring import IdGroup, Scorer, native
from texts import all_texts, groups


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    save_checkpoint(folder, "qwen3", torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def id_groups() -> list[IdGroup]:
    """Six prompts that begin with the same 300 tokens, as with one system prompt, and end differently."""
    real = groups(6, 5)
    tokenizer = make_tokenizer(all_texts(real))
    system = tokenizer.encode(" ".join(all_texts(real)))[:300]
    return [(system + tokenizer.encode(prompt), [tokenizer.encode(r) for r in rs if r]) for prompt, rs in real]


async def alone(checkpoint: Path, pair: tuple[list[int], list[int]]) -> float:
    """By an engine that has never seen anything else."""
    async with native(checkpoint, num_threads=2) as scorer:
        return (await scorer.scores([(pair[0], [pair[1]])])).item()


async def test_alone_batched_reordered_cold_warm_and_half_warm_are_the_same_bits(
    checkpoint: Path, id_groups: list[IdGroup]
) -> None:
    prompt, responses = id_groups[0]
    pair = (prompt, responses[0])
    wanted = await alone(checkpoint, pair)

    async def check(scorer: Scorer, batch: list[IdGroup], num_cached: int) -> None:
        result = await scorer.run(batch)
        index = next(i for i, (p, _) in enumerate(batch) if p == prompt)
        assert result.groups[index].num_cached_tokens == num_cached
        place = list(batch[index][1]).index(pair[1])
        assert result.groups[index].items[place].score == wanted

    async with native(checkpoint, num_threads=2) as scorer:
        await check(scorer, id_groups, 0)  # cold, in a batch
        await check(scorer, id_groups[::-1], len(prompt))  # warm, reordered
        await check(scorer, [(prompt, responses[::-1])], len(prompt))
    async with native(checkpoint, num_threads=2) as scorer:
        await scorer.run(id_groups[1:2])  # only the common beginning is cached: two blocks of 128
        await check(scorer, [(prompt, [responses[0]])], 256)
    async with native(checkpoint, num_threads=2, max_batch_tokens=64) as scorer:
        await check(scorer, id_groups, 0)  # cut into many forwards


async def test_five_random_batches_in_random_order_give_every_pair_the_same_bits(
    checkpoint: Path, id_groups: list[IdGroup]
) -> None:
    seen: dict[tuple[int, int], float] = {}
    generator = random.Random(0)
    for budget in (50, 300, 1000, 5000, 20000):
        order = [(g, r) for g, (_, responses) in enumerate(id_groups) for r in range(len(responses))]
        generator.shuffle(order)
        half = order[: len(order) // 2]
        async with native(checkpoint, num_threads=2, max_batch_tokens=budget) as scorer:
            for part in (half, order):
                scores = await scorer.scores([(id_groups[g][0], [id_groups[g][1][r]]) for g, r in part])
                for place, score in zip(part, scores.tolist(), strict=True):
                    assert seen.setdefault(place, score) == score


async def test_where_prompt_and_response_are_divided_changes_no_bit(checkpoint: Path, id_groups: list[IdGroup]) -> None:
    prompt, responses = id_groups[0]
    whole = [*prompt, *responses[0]]
    async with native(checkpoint, num_threads=2) as scorer:
        scores = [(await scorer.scores([(whole[:cut], [whole[cut:]])])).item() for cut in (0, 1, 127, 128, 301)]
    assert len(set(scores)) == 1


@dataclass(frozen=True)
class Ways:
    """Scores of responses of one token and of many, by how they were computed."""

    together: list[float]
    warm: list[float]  # one by one
    alone: list[float]  # the first three, each by a fresh engine
    single_row: tuple[float, float]  # of a forward of a single row: by itself, among others


async def all_ways(checkpoint: Path) -> Ways:
    generator = random.Random(1)
    prompt = [generator.randrange(400) for _ in range(230)]
    responses = [[generator.randrange(400) for _ in range(n)] for n in (1, 2, 17, 1, 64, 200)]
    async with native(checkpoint, num_threads=2) as scorer:
        assert scorer.info.path == "packed"  # padded forwards make no such promise
        together = (await scorer.scores([(prompt, responses)])).tolist()
        warm = [(await scorer.scores([(prompt, [response])])).item() for response in responses]
    apart = [await alone(checkpoint, (prompt, response)) for response in responses[:3]]
    async with native(checkpoint, num_threads=2) as scorer:
        first = (await scorer.scores([([], [[7]])])).item()
        again = (await scorer.scores([([], [[7]]), (prompt, responses)]))[0].item()
    return Ways(together, warm, apart, (first, again))


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 1024, "intermediate_size": 3072},
        {"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16},
    ],
    ids=["the widths of Qwen3-0.6B", "as many key heads as heads"],
)
async def test_a_wide_model_gives_one_row_the_same_bits_as_many(tmp_path: Path, shape: dict[str, int]) -> None:
    """A product of one row takes another path in oneDNN once the inner dimension is 2048 or more."""
    model = save_checkpoint(tmp_path, "llama", torch.bfloat16, num_hidden_layers=2, **shape)
    with torch.no_grad():  # as large for their width as those of narrow models: rounding would grow beyond the canary
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_((64 / shape["hidden_size"]) ** 0.5)
    model.save_pretrained(tmp_path)
    ways = await all_ways(tmp_path)
    assert ways.warm == ways.together
    assert ways.alone == ways.together[:3]
    assert ways.single_row[0] == ways.single_row[1]
