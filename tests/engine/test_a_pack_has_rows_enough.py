"""A row's bits do not depend on how many there are, where torch's own operations would compute few in another way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import save_checkpoint
from rewardserve.engine.native.batch import PackRows, build_pack
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.models.kv_pool import KVPool
from rewardserve_kernels.ragged import Segment


def rows_of(*lengths: int) -> PackRows:
    """Sequences of these lengths, each read at its end."""
    begins = np.cumsum([0, *lengths])
    segments = tuple(Segment(int(at), n, 0, (), store=False) for at, n in zip(begins, lengths, strict=False))
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    return PackRows(positions + 5, positions, segments, segments, tuple(range(len(lengths))))


@pytest.mark.parametrize(("for_gpu", "least"), [(True, 16), (False, 2)])
@pytest.mark.parametrize("lengths", [(1,), (3, 1), (5, 20)], ids=str)
def test_no_norm_and_no_product_sees_fewer_rows_than_it_takes(
    lengths: tuple[int, ...], for_gpu: bool, least: int, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, "qwen3")
    model = load_runner(NativeOptions(str(tmp_path), num_threads=1, compile="off")).model
    seen: list[int] = []
    for module in model.backbone.module.modules():
        if isinstance(module, torch.nn.Linear) or "Norm" in type(module).__name__:
            module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, 1).shape[0]))
    rows = rows_of(*lengths)
    features = model.features_packed(build_pack(rows, model.backbone, for_gpu), KVPool(1))
    assert len(seen) > 20 and min(seen) >= least
    model.backbone.prepare_padded()
    ids = [torch.from_numpy(rows.input_ids[s.row : s.row + s.num_rows]) for s in rows.segments]
    wanted = model.features_padded(ids, [[length - 1] for length in lengths])
    assert features.shape == wanted.shape
    assert (features - wanted).abs().max() <= 1e-5 * wanted.abs().max()
