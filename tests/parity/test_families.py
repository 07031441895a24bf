"""Packed, shared, cached and cut up: the score is still the one of plain padded Hugging Face."""

from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, MORE_FAMILIES, NOT_PACKABLE, make_tokenizer, padded_scores, save_checkpoint
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.models.heads import LinearHead
from rewardserve.models.reward_model import RewardModel
from rewardserve_kernels.pooling import reference
from rewardserve_kernels.pooling.running_mean import sum_pieces
from scoring import IdGroup, joined, native
from texts import all_texts, groups

# How a request may meet the engine. The tiny budget cuts prompts and responses into several forwards.
BUDGETS = {"one forward": 4096, "several forwards": 100}


@pytest.fixture(scope="module")
def id_groups() -> list[IdGroup]:
    """Ragged groups of real text; two prompts begin alike, past a block's border."""
    real = groups(4, 4, max_characters=400)
    tokenizer = make_tokenizer(all_texts(real))
    encoded = [(tokenizer.encode(prompt), [tokenizer.encode(r) for r in responses]) for prompt, responses in real]
    long = tokenizer.encode(" ".join(all_texts(real)))[:300]
    beginning = long[:200]
    encoded[0] = (beginning + encoded[0][0], encoded[0][1])
    encoded[1] = (beginning + encoded[1][0][:20], [[*encoded[1][1][0][:1]], *encoded[1][1][1:]])
    return encoded


async def all_ways(folder: Path, id_groups: list[IdGroup], **options) -> dict[str, torch.Tensor]:
    """Scores by the way they were computed."""
    ways = {}
    for name, budget in BUDGETS.items():
        async with native(folder, max_batch_tokens=budget, **options) as scorer:
            assert scorer.info.path == "packed", scorer.info.path_reason
            ways[f"cold, {name}"] = await scorer.scores(id_groups)
            warm = await scorer.run(id_groups)
            assert [g.num_cached_tokens for g in warm.groups] == [len(prompt) for prompt, _ in id_groups]
            ways[f"warm, {name}"] = await scorer.scores(id_groups)
        async with native(folder, max_batch_tokens=budget, **options) as scorer:
            ways[f"one by one, {name}"] = torch.cat(
                [await scorer.scores([(prompt, [r])]) for prompt, responses in id_groups for r in responses]
            )
    return ways


@pytest.mark.parametrize("family", FAMILIES)
async def test_fp32_scores_equal_padded_hugging_face(family: str, tmp_path: Path, id_groups: list[IdGroup]) -> None:
    save_checkpoint(tmp_path, family)
    wanted = padded_scores(tmp_path, joined(id_groups), torch.float32)
    for way, got in (await all_ways(tmp_path, id_groups)).items():
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max(), way


@pytest.mark.parametrize("family", MORE_FAMILIES)
async def test_other_families_are_packed_too_and_score_the_same(
    family: str, tmp_path: Path, id_groups: list[IdGroup]
) -> None:
    few = id_groups[:2]
    save_checkpoint(tmp_path, family)
    wanted = padded_scores(tmp_path, joined(few), torch.float32)
    async with native(tmp_path, max_batch_tokens=300) as scorer:
        assert scorer.info.path == "packed", scorer.info.path_reason
        for way in ("cold", "warm"):
            got = await scorer.scores(few)
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max(), way


@pytest.mark.parametrize("family", FAMILIES)
async def test_bf16_scores_are_bitwise_the_same_alone_batched_cut_up_cold_and_warm(
    family: str, tmp_path: Path, id_groups: list[IdGroup]
) -> None:
    save_checkpoint(tmp_path, family, torch.bfloat16)
    ways = await all_ways(tmp_path, id_groups, num_threads=2)
    for way, got in ways.items():
        assert torch.equal(got, ways["cold, one forward"]), way


@pytest.mark.parametrize("family", FAMILIES)
async def test_bf16_is_no_less_exact_than_hugging_face_in_bf16(family: str, tmp_path: Path) -> None:
    """Against the same weights in fp32, pair by pair: the mean difference of the two errors is not above zero.

    Both errors are roundings, so single pairs go either way; two standard errors of the mean are allowed for that.
    """
    real = groups(5, 10, max_characters=300)
    tokenizer = make_tokenizer(all_texts(real))
    pairs = [(tokenizer.encode(prompt), [tokenizer.encode(r) for r in responses if r]) for prompt, responses in real]
    save_checkpoint(tmp_path, family, torch.bfloat16)
    exact = padded_scores(tmp_path, joined(pairs), torch.float32)
    theirs = (padded_scores(tmp_path, joined(pairs), torch.bfloat16) - exact).abs()
    async with native(tmp_path) as scorer:
        ours = (await scorer.scores(pairs) - exact).abs()
    difference = ours - theirs
    print(f"{family}: mean error {ours.mean():.2e}, Hugging Face {theirs.mean():.2e}, {len(ours)} pairs")
    assert difference.mean() <= 2 * difference.std() / len(difference) ** 0.5


@pytest.mark.parametrize("family", NOT_PACKABLE)
async def test_a_family_that_cannot_be_packed_is_served_right_by_the_fallback(
    family: str, tmp_path: Path, id_groups: list[IdGroup]
) -> None:
    save_checkpoint(tmp_path, family)
    wanted = padded_scores(tmp_path, joined(id_groups), torch.float32)
    async with native(tmp_path) as scorer:
        assert scorer.info.path == "padded" and scorer.info.path_reason
        got = await scorer.scores(id_groups)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


async def test_compiled_layers_give_the_same_scores(tmp_path: Path, id_groups: list[IdGroup]) -> None:
    save_checkpoint(tmp_path)
    wanted = padded_scores(tmp_path, joined(id_groups), torch.float32)
    async with native(tmp_path, compile="on") as scorer:
        assert scorer.info.path == "packed"
        for _ in range(2):
            got = await scorer.scores(id_groups)
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def last_scores(model: RewardModel, rows: list[torch.Tensor]) -> torch.Tensor:
    return model.features_padded(rows, [[len(row) - 1] for row in rows])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_final_norm_and_head_in_one_give_the_scores_of_the_two(family: str, tmp_path: Path) -> None:
    """Which kind of norm a family has is found by trying it: none is served by a formula that is not its own."""
    save_checkpoint(tmp_path, family)
    model = load_runner(NativeOptions(str(tmp_path), path="padded")).model
    with torch.no_grad():  # a fresh norm's weights are all alike
        norm = model.backbone._final_norm.norm
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rows = [torch.arange(5, 5 + length) for length in (3, 40, 17)]
    wanted = last_scores(model, rows)
    assert model.use_pool_head(reference.pool_head) is None
    assert model._norm is not None, "not recognized"
    got = last_scores(model, rows)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_sums_that_are_not_torchs_to_the_bit_are_not_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / "rewardserve.toml").write_text('[head]\nkind = "linear"\nweights = "score"\n[read]\nat = "mean"\n')
    model = load_runner(NativeOptions(str(tmp_path), path="padded")).model

    def fails(*arguments):
        raise RuntimeError("no compiler\nand more")

    assert model.use_sum_pieces(lambda *arguments: sum_pieces(*arguments) * (1 + 2**-20)) == "it gives other sums"
    assert model.use_sum_pieces(fails) == "RuntimeError: no compiler"
    assert model._sum_pieces is sum_pieces
    same = lambda *arguments: sum_pieces(*arguments).clone()  # noqa: E731
    assert model.use_sum_pieces(same) is None and model._sum_pieces is same


def test_a_pool_head_is_tried_in_the_precision_and_with_the_heads_it_will_serve(tmp_path: Path) -> None:
    """On a GPU another precision, or another number of heads, is another kernel: compiled when it is first needed."""
    save_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = load_runner(NativeOptions(str(tmp_path), path="padded")).model
    two = LinearHead(torch.randn(2, 64), torch.randn(2))
    model.heads = (model.head, two)
    tried: list[tuple] = []

    def recorded(hidden, spans, weight, bias, norm):
        tried.append((hidden.dtype, len(weight), bias is not None))
        return reference.pool_head(hidden, spans, weight, bias, norm)

    assert model.use_pool_head(recorded) is None
    assert tried == [(torch.bfloat16, 1, False), (torch.bfloat16, 2, True)]
    assert model.head is model.heads[0]
    in_trial = set(tried)
    last_scores(model, [torch.arange(5, 45)])
    assert set(tried) == in_trial, "it serves what was not tried"
    worse = lambda hidden, spans, weight, *rest: reference.pool_head(hidden, spans, weight, *rest) * len(weight)  # noqa: E731
    assert model.use_pool_head(worse) == "it gives other scores" and model.head is model.heads[0]


def test_a_pool_head_that_fails_or_gives_other_scores_is_not_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    model = load_runner(NativeOptions(str(tmp_path), path="padded")).model
    rows = [torch.arange(5, 45)]
    wanted = last_scores(model, rows)

    def wrong(*arguments):
        return reference.pool_head(*arguments) * 1.01

    def fails(*arguments):
        raise ValueError("rows of up to 8 are taken")

    assert model.use_pool_head(wrong) == "it gives other scores"
    assert torch.equal(last_scores(model, rows), wanted)
    assert model.use_pool_head(fails) == "ValueError: rows of up to 8 are taken"
    assert torch.equal(last_scores(model, rows), wanted)
