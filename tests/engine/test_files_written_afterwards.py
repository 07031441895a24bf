"""A model that is loaded is what it was when it was loaded, whatever is written over its files."""

from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from safetensors.torch import load_file
from scoring import native

IDS = [((1, 2, 3), ((4, 5), (6, 7, 8)))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
async def test_what_is_written_over_a_file_that_was_loaded_changes_no_score(
    tmp_path: Path, dtype: torch.dtype, path: str, name: str
) -> None:
    save_checkpoint(tmp_path, dtype=dtype)
    if name == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / name)
        (tmp_path / "model.safetensors").unlink()
    async with native(tmp_path) as scorer:
        wanted = await scorer.scores(IDS)
    async with native(tmp_path, path=path) as scorer:
        with (tmp_path / name).open("r+b") as stream:
            stream.write(bytes((tmp_path / name).stat().st_size))
        got = await scorer.scores(IDS)
    assert (got - wanted).abs().max() <= (1e-5 if dtype is torch.float32 else 0.05) * wanted.abs().max()
