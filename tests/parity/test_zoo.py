"""Every family of reward models gives its authors' number: cold, warm, one by one, batched with others, cut up."""

import random
import runpy
from pathlib import Path

import pytest
from rewardserve.engine.base import EngineItem
from scoring import IdGroup, native
from zoo import STEPWISE, ZOO, Kind, Wanted, write

BUDGETS = {"one forward": 4096, "several forwards": 150}


def id_groups(kind: Kind) -> list[IdGroup]:
    """Prompts past a block's border, two that begin alike; what the model looks for lies in them, across a border and
    in responses too."""
    random.seed(2)

    def ids(count: int, sprinkled: int = 0) -> list[int]:
        found = [random.randrange(1, min(kind.vocab_size, 400)) for _ in range(count)]
        for _ in range(sprinkled if kind.sprinkled else 0):
            pattern = random.choice(kind.sprinkled)
            place = random.randrange(0, max(1, count - len(pattern)))
            found[place : place + len(pattern)] = pattern
        return found

    beginning = ids(300, 2)
    for pattern in kind.sprinkled:  # across the border of two blocks, and of prompt and response
        beginning[126 : 126 + len(pattern)] = pattern
    tails = [pattern[: len(pattern) // 2] for pattern in kind.sprinkled] or [[]]
    heads = [pattern[len(pattern) // 2 :] for pattern in kind.sprinkled] or [[]]
    must = kind.sprinkled[0] if kind.sprinkled else []
    prompts = [
        [*beginning, *ids(20), *tails[0]],
        [*beginning, *ids(40)],
        [*must, *ids(5)],
        [*ids(100, 1), *must, *ids(28)],
    ]
    bodies = [[ids(30, 1), [*heads[0], *ids(3)], ids(200, 2)], [ids(1)], [ids(140), ids(9, 1)], [[7]]]
    return [(p, [[*body, *kind.ends] for body in group]) for p, group in zip(prompts, bodies, strict=True)]


def agrees(item: EngineItem, wanted: Wanted, shift: float = 0.0, scale: float = 1.0) -> bool:
    def close(got: float, right: float) -> bool:
        return abs(got - right) <= 1e-5 * max(1.0, abs(right))

    assert item.failure is None and item.score is not None, item.failure
    if len(item.attributes) != len(wanted.attributes) or len(item.steps) != len(wanted.steps):
        return False
    return (
        close((item.score - shift) / scale, wanted.score)
        and all(map(close, item.attributes, wanted.attributes))
        and all(map(close, item.steps, wanted.steps))
        and (wanted.std is None or (item.std is not None and close(item.std, wanted.std)))
    )


@pytest.mark.parametrize("name", ZOO)
async def test_every_family_gives_its_published_formulas_number(name: str, tmp_path: Path) -> None:
    kind = ZOO[name]
    folder, oracle = write(kind, tmp_path)
    groups = id_groups(kind)
    wanted = [[oracle([*prompt, *response]) for response in responses] for prompt, responses in groups]
    for way, budget in BUDGETS.items():
        async with native(folder, max_batch_tokens=budget) as scorer:
            info = scorer.info
            assert info.path == ("packed" if kind.packed else "padded"), info.path_reason
            assert len(info.attributes) == len(wanted[0][0].attributes)
            cold, warm = await scorer.run(groups), await scorer.run(groups)
            if kind.packed:
                assert [g.num_cached_tokens for g in warm.groups] == [len(prompt) for prompt, _ in groups]
            alone = [
                [(await scorer.run([(prompt, [response])])).groups[0].items[0] for response in responses]
                for prompt, responses in groups
            ]
        for state, items in (
            ("cold", [g.items for g in cold.groups]),
            ("warm", [g.items for g in warm.groups]),
            ("alone", alone),
        ):
            for got, right in zip(items, wanted, strict=True):
                for item, number in zip(got, right, strict=True):
                    assert agrees(item, number, info.shift, info.scale), (way, state, item, number)


async def test_a_response_without_what_its_model_reads_fails_alone(tmp_path: Path) -> None:
    folder, oracle = write(ZOO["Qwen2.5-Math-PRM-7B"], tmp_path)
    async with native(folder) as scorer:
        tag = 151651
        items = (await scorer.run([([5, 6, 7], [[8, tag], [8, 9], [tag, 3, tag]]), ([4], [[3]])])).groups
    first, second, third = items[0].items
    assert agrees(first, oracle([5, 6, 7, 8, tag])) and agrees(third, oracle([5, 6, 7, tag, 3, tag]))
    for lacking in (second, items[1].items[0]):
        assert (
            lacking.failure is not None
            and "<extra_0>" in lacking.failure.message
            and str(tag) in lacking.failure.message
        )


async def test_positions_named_by_the_request_are_read_in_prompt_and_response(tmp_path: Path) -> None:
    folder, oracle = write(STEPWISE, tmp_path)
    random.seed(3)
    prompt, response = ([random.randrange(1, 400) for _ in range(count)] for count in (290, 180))
    every = oracle([*prompt, *response]).steps
    places = {"in both": (5, 130, 289, 290, 400, 469), "other": (200, 469), "all": (*range(250, 470, 3),)}
    for budget in BUDGETS.values():
        async with native(folder, max_batch_tokens=budget) as scorer:
            for positions in (*places.values(), *places.values()):  # warm: what was not kept is computed anew
                result = await scorer.run([(prompt, [response])], steps=[[positions]])
                item = result.groups[0].items[0]
                assert agrees(item, Wanted(min(every[p] for p in positions), steps=tuple(every[p] for p in positions)))
            assert result.groups[0].num_cached_tokens == len(prompt)


def test_the_documented_table_is_the_one_the_server_goes_by() -> None:
    generate = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "generate.py"))
    written = generate["PAGE"].read_text()
    assert generate["page"](written) == written, "run python docs/generate.py"
