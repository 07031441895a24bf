"""Models whose rotary embedding changes with the length ("longrope"): a score must not depend on its neighbours."""

import random
from pathlib import Path

import pytest
import torch
from checkpoints import padded_scores, save_checkpoint
from scoring import IdGroup, joined, native

SWITCH = 256  # tokens
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 2 * i for i in range(8)],
    "original_max_position_embeddings": SWITCH,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, "phi3", rope_parameters=ROPE, original_max_position_embeddings=SWITCH)
    return tmp_path


@pytest.fixture
def id_groups() -> list[IdGroup]:
    """One pair on each side of the switch."""
    generator = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(400) for _ in range(count)]

    return [(tokens(40), [tokens(20)]), (tokens(500), [tokens(20)])]


async def test_beyond_the_switch_it_is_served_padded_and_right(checkpoint: Path, id_groups: list[IdGroup]) -> None:
    wanted = torch.cat([padded_scores(checkpoint, [row], torch.float32) for row in joined(id_groups)])
    mixed = padded_scores(checkpoint, joined(id_groups), torch.float32)
    assert (mixed - wanted).abs().max() > 1e-2, "the trap is not there: this test shows nothing"
    async with native(checkpoint) as scorer:
        assert scorer.info.path == "padded" and f"max_length = {SWITCH}" in scorer.info.path_reason
        for batch in (id_groups, id_groups[:1]):
            got = await scorer.scores(batch)
            assert torch.allclose(got, wanted[: len(batch)], rtol=1e-5, atol=1e-6)


async def test_within_the_switch_it_is_packed(checkpoint: Path, id_groups: list[IdGroup]) -> None:
    wanted = padded_scores(checkpoint, joined(id_groups[:1]), torch.float32)
    async with native(checkpoint, max_length=SWITCH) as scorer:
        assert scorer.info.path == "packed"
        assert torch.allclose(await scorer.scores(id_groups[:1]), wanted, rtol=1e-5, atol=1e-6)
