"""NaN, infinity and too little memory concern the one response they happen in, never its neighbours."""

import checkpoints
import pytest
import torch
from rewardserve.engine.native import engine as native_engine
from rewardserve.engine.native.load import load_runner
from safetensors.torch import load_file, save_file
from scoring import native

INTERNAL, RESOURCE_EXHAUSTED = 13, 8
POISON = 398  # a token whose embedding is infinite; not one of the canary's, or the model would be served padded


def poisoned(tmp_path_factory, name, change):
    folder = tmp_path_factory.mktemp(name)
    checkpoints.save_checkpoint(folder, dtype=torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    def infinite(weights):
        weights["model.embed_tokens.weight"][POISON] = float("inf")

    def not_a_number(weights):
        weights["score.weight"][0, 0] = float("nan")

    one = poisoned(tmp_path_factory, "infinite", infinite)
    two = poisoned(tmp_path_factory, "nan", not_a_number)
    # Few blocks, so that they are soon used again.
    return start("--model", f"infinite={one}", "--model", f"nan={two}", "--prefix-cache-mb", "8").ready()


def clean_ids(kit, seed, length):
    return [i for i in kit.random_ids(seed, length + 20) if i != POISON][:length]


def test_a_head_of_nan_gives_no_number(server, kit):
    reply = server.scoring.Score(kit.ids_request([1], [[2], [3, 4]], model="nan"), timeout=kit.ANTI_HANG_S)
    for item in reply.groups[0].items:
        assert item.status.code == INTERNAL and not item.HasField("score")
        assert "nan" in item.status.message


def test_an_infinite_token_fails_its_own_response_and_no_other(server, kit):
    prompt = clean_ids(kit, 1, 200)
    good = [clean_ids(kit, 10 + i, 20 + i) for i in range(6)]
    bad = [POISON, *clean_ids(kit, 30, 5)]

    def score(responses):
        request = kit.ids_request(prompt, responses, model="infinite")
        return server.scoring.Score(request, timeout=kit.ANTI_HANG_S).groups[0].items

    alone = [score([response])[0].score for response in good]
    mixed = score([*good[:3], bad, *good[3:]])
    assert [item.status.code for item in mixed] == [0, 0, 0, INTERNAL, 0, 0, 0]
    assert not mixed[3].HasField("score")
    assert [item.score for item in mixed if item.HasField("score")] == alone


def test_an_infinite_prompt_leaves_nothing_behind_in_the_prefix_cache(server, kit):
    """Blocks that held NaN are given to others: what is masked there must not leak (0 * NaN is NaN)."""
    requests = [
        kit.ids_request(clean_ids(kit, 100 + i, 130 + 17 * i), [clean_ids(kit, 200 + i, 9)], model="infinite")
        for i in range(8)
    ]
    wanted = [kit.scores_of(server.scoring.Score(request, timeout=kit.ANTI_HANG_S)) for request in requests]
    assert None not in [score for scores in wanted for score in scores]
    capacity = server.model("infinite").prefix_cache_tokens
    for i in range(capacity // 1500 + 3):  # every block has held NaN once
        ids = [POISON, *clean_ids(kit, 300 + i, 1500)]
        reply = server.scoring.Score(kit.ids_request(ids, [[1]], model="infinite"), timeout=kit.ANTI_HANG_S)
        assert reply.groups[0].items[0].status.code == INTERNAL
    again = [kit.scores_of(server.scoring.Score(request, timeout=kit.ANTI_HANG_S)) for request in requests]
    assert again == wanted


def test_the_poisoned_model_is_still_packed(server):
    assert server.model("infinite").path == 1  # or the tests above say nothing about packs


@pytest.fixture
def out_of_memory_above(monkeypatch):
    """A function that makes forwards of more tokens, or with a given token, run out of memory."""

    def limit(num_tokens: int, never: int = -1) -> list[int]:
        sizes: list[int] = []

        def load(options):
            loaded = load_runner(options)
            launch = loaded.runner.launch

            def launch_if_it_fits(step):
                ids = step.inputs.input_ids
                sizes.append(len(ids))
                if len(ids) > num_tokens or (ids == never).any():
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return launch(step)

            loaded.runner.launch = launch_if_it_fits
            return loaded

        monkeypatch.setattr(native_engine, "load_runner", load)
        return sizes

    return limit


async def test_what_does_not_fit_at_once_is_split_and_scored_the_same(out_of_memory_above, bf16_checkpoint, kit):
    groups = [
        (kit.random_ids(i, 40 + 60 * i), [kit.random_ids(100 + 5 * i + j, 10 + 9 * j) for j in range(5)])
        for i in range(6)
    ]
    async with native(bf16_checkpoint, max_batch_tokens=2048) as scorer:
        wanted = await scorer.scores(groups)
    sizes = out_of_memory_above(150)
    async with native(bf16_checkpoint, max_batch_tokens=2048) as scorer:
        assert torch.equal(await scorer.scores(groups), wanted)
        assert max(sizes) > 150
        assert torch.equal(await scorer.scores(groups), wanted)


async def test_what_can_never_fit_fails_alone(out_of_memory_above, bf16_checkpoint, kit):
    prompt = clean_ids(kit, 1, 100)
    good = [clean_ids(kit, 2 + i, 30) for i in range(5)]
    async with native(bf16_checkpoint) as scorer:
        wanted = (await scorer.scores([(prompt, good)])).tolist()
    out_of_memory_above(10_000, never=POISON)
    async with native(bf16_checkpoint) as scorer:
        result = await scorer.run([(prompt, [*good[:2], [POISON, 1], *good[2:]]), ([POISON], [[1], [2]])])
        first, second = result.groups
        assert [item.score for item in first.items if item.failure is None] == wanted
        assert first.items[2].failure.code == RESOURCE_EXHAUSTED and "out of memory" in first.items[2].failure.message
        assert [item.failure.code for item in second.items] == [RESOURCE_EXHAUSTED] * 2
        assert (await scorer.scores([(prompt, good)])).tolist() == wanted  # and the engine lives on
