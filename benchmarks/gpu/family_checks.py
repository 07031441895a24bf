"""The gate, second part: every family of models against padded Hugging Face, by its canary at load."""

import tempfile
from pathlib import Path

import torch
from checks import Checks
from part import Part
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from served import how_it_runs, require_meant


def family_checks(part: Part) -> None:
    check = Checks(part)
    for family in families(part):
        check(f"canary {family}", lambda: family_is_right(part, family))  # noqa: B023


def families(part: Part) -> list[str]:
    from checkpoints import FAMILIES, MORE_FAMILIES

    return [*FAMILIES, *MORE_FAMILIES][: 2 if part.tiny else None]


def family_is_right(part: Part, family: str) -> tuple[bool, str]:
    """Raises RuntimeError where it is not served as it is meant to be."""
    from checkpoints import save_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), family, torch.bfloat16)
        device, cache = str(part.device), 64 << 20
        options = NativeOptions(folder, device=device, compile="off", cuda_graphs=False, prefix_cache_bytes=cache)
        loaded = load_runner(options)
    require_meant(part, options, how_it_runs(loaded))
    return True, f"final hidden states within {loaded.info.canary_error:.1e} of padded Hugging Face"
