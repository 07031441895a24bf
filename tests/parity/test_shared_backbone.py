"""Adapters of one base over one backbone score as each does by itself, and share what is exactly the same."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from adapters import ALPHA, RANK, TARGETS, adapter_of, merged_by_hand, save_adapter
from checkpoints import padded_scores, save_checkpoint
from rewardserve.engine.base import EngineListener, EngineRequest, EngineResult
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import LoadFailed
from rewardserve.types import EncodedGroup
from safetensors.torch import load_file
from scoring import joined, pack

GROUPS = [([5, 6, 7] * 60, [[8] * 5, [9, 10, 11]]), ([3], [[4, 5]])]
ADAPTERS = {  # rank, targets
    "lora": (RANK, TARGETS),
    "other": (2, TARGETS[1:]),
    "head": (RANK, ()),
    "another head": (RANK, ()),
}
LAYERS_ALIKE = [f"layers.{number}.{part}" for number in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return made(tmp_path_factory.mktemp("shared"), ADAPTERS)


def made(home: Path, adapters: dict[str, tuple[int, Sequence[str]]]) -> dict[str, Path]:
    """The folders of the base, and of an adapter and what it is merged, for each."""
    save_checkpoint(home / "base")
    weights = load_file(home / "base" / "model.safetensors")
    for name, (rank, targets) in adapters.items():
        tensors = adapter_of(weights, rank=rank, targets=targets, seed=name)
        save_adapter(home / name, home / "base", tensors)
        merged_by_hand(home / "base", tensors, ALPHA / rank, home / f"{name} merged")
    return {folder.name: folder for folder in home.iterdir()}


@pytest.fixture(scope="module")
def wanted(folders) -> list[torch.Tensor]:
    return scores_of_the_merged(folders)


def scores_of_the_merged(folders: dict[str, Path]) -> list[torch.Tensor]:
    return [padded_scores(folders[f"{name} merged"], joined(GROUPS), torch.float32) for name in ADAPTERS]


def options(folders: dict[str, Path], **more) -> NativeOptions:
    first, *others = [str(folders[name]) for name in ADAPTERS]
    return NativeOptions(first, beside=tuple(others), num_threads=2, prefix_cache_bytes=16 << 20, **more)


async def score(engine: NativeEngine, variant: int, name: str) -> EngineResult:
    encoded = tuple(EncodedGroup(pack(prompt), tuple(map(pack, responses))) for prompt, responses in GROUPS)
    return await engine.score(EngineRequest(f"{name} {variant}", encoded, variant=variant))


def scores_of(result: EngineResult) -> torch.Tensor:
    return torch.tensor([item.score for group in result.groups for item in group.items])


@pytest.mark.parametrize("path", ["auto", "padded"])
async def test_each_scores_as_it_does_by_itself_in_any_order_and_all_at_once(folders, wanted, path: str) -> None:
    engine = NativeEngine(options(folders, path=path))
    try:
        info = await engine.start(EngineListener())
        assert info.path == ("padded" if path == "padded" else "packed")
        for round_ in range(2):  # cold and warm
            for variant in (2, 0, 3, 1):
                got = scores_of(await score(engine, variant, f"round {round_}"))
                assert (got - wanted[variant]).abs().max() <= 1e-5 * wanted[variant].abs().max()
        at_once = await asyncio.gather(*(score(engine, n % 4, f"at once {n}") for n in range(16)))
        for number, result in enumerate(at_once):
            close = 1e-5 * wanted[number % 4].abs().max()
            assert (scores_of(result) - wanted[number % 4]).abs().max() <= close
    finally:
        await engine.stop()
    assert len({tuple(scores.tolist()) for scores in wanted}) == len(ADAPTERS)


async def test_prompts_are_shared_by_those_that_differ_in_their_heads_and_by_no_others(folders) -> None:
    engine = NativeEngine(options(folders))
    names = list(ADAPTERS)
    try:
        await engine.start(EngineListener())
        cached = {}
        for name in ("head", "another head", "lora", "other"):
            result = await score(engine, names.index(name), "first")
            cached[name] = result.groups[0].num_cached_tokens
        assert cached == {"head": 0, "another head": 180, "lora": 0, "other": 0}
    finally:
        await engine.stop()


async def test_steps_in_a_prompt_that_another_head_has_read_are_read_again(folders) -> None:
    """What is kept of a prompt's steps is the head's."""
    prompt, response, steps = [5, 6, 7] * 60, [8, 9], (20, 130, 181)
    encoded = (EncodedGroup(pack(prompt), (pack(response),), (steps,)),)
    rows = [[*prompt, *response][: step + 1] for step in steps]
    names = list(ADAPTERS)
    engine = NativeEngine(options(folders))
    try:
        await engine.start(EngineListener())
        for name in ("head", "another head", "head"):
            result = await engine.score(EngineRequest(name, encoded, variant=names.index(name)))
            wanted = padded_scores(folders[f"{name} merged"], rows, torch.float32)
            got = torch.tensor(result.groups[0].items[0].steps)
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    finally:
        await engine.stop()


def test_weights_are_held_once_and_versions_tell_how_a_score_was_rounded(folders) -> None:
    alone = load_runner(NativeOptions(str(folders["head"]), prefix_cache_bytes=16 << 20))
    shared = load_runner(options(folders))
    assert shared.info.num_parameters < 1.1 * alone.info.num_parameters
    infos = [shared.info.of(variant) for variant in range(len(ADAPTERS))]
    assert all(info.version.endswith("-adapted") for info in infos)
    assert infos[2].version == f"{alone.info.version}-adapted"
    heads = load_runner(NativeOptions(str(folders["head"]), beside=(str(folders["another head"]),)))
    assert heads.info.version == alone.info.version  # the same numbers to the bit
    assert len({info.version for info in infos}) == len(ADAPTERS)


async def test_compiled_in_bf16_each_is_as_close_to_its_own_in_fp32_as_rounding_allows(tmp_path: Path) -> None:
    """Every layer adapted alike, as PEFT does it: layers that differ are compiled each by itself, which takes long."""
    folders = made(tmp_path, {name: (rank, targets and LAYERS_ALIKE) for name, (rank, targets) in ADAPTERS.items()})
    wanted = scores_of_the_merged(folders)
    engine = NativeEngine(options(folders, dtype="bfloat16", compile="on"))
    try:
        assert (await engine.start(EngineListener())).path == "packed"
        for variant in (1, 3, 0, 2):
            got = scores_of(await score(engine, variant, "compiled"))
            spread = wanted[variant].abs().max()
            assert (got - wanted[variant]).abs().max() <= 0.1 * spread, variant
    finally:
        await engine.stop()


def test_what_cannot_share_a_backbone_is_named(folders, tmp_path: Path) -> None:
    weights = load_file(folders["base"] / "model.safetensors")
    tensors = adapter_of(weights, seed="whole")
    whole = "base_model.model.model.norm.modules_to_save.weight"
    save_adapter(tmp_path / "whole", folders["base"], tensors | {whole: torch.ones(64)})
    save_checkpoint(tmp_path / "elsewhere")
    save_adapter(tmp_path / "stranger", tmp_path / "elsewhere", tensors)
    for source, words in (
        (tmp_path / "whole", r"weights of its own besides its head: model\.norm\.weight"),
        (tmp_path / "stranger", "adapts another model"),
        (folders["base"], "adapts another model"),
    ):
        with pytest.raises(LoadFailed, match=f"{words}.*--no-share-backbone"):
            load_runner(NativeOptions(str(folders["lora"]), beside=(str(source),)))


def test_weights_of_one_cannot_be_updated_in_place(folders) -> None:
    shared = load_runner(options(folders, path="padded"))
    with pytest.raises(LoadFailed, match=r"shares its backbone with others.*use Swap"):
        shared.refreshed(str(folders["other"]))
