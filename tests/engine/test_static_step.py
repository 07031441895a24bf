"""What a GPU computes on, run on a CPU: Triton attention under its interpreter, all rows stored at once, padded tiles,
inputs at fixed places, page tables. Scores are those of the plain path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint

SUPPORT = Path(__file__).parents[1] / "support"
pytest.importorskip("triton", reason="triton is not installed")

# In a process of its own: the interpreter is chosen when triton is first imported, for good.
PROGRAM = """
import sys
import torch
from rewardserve.engine.base import EngineRequest
from rewardserve.engine.native import graphs
from rewardserve.engine.native.batch import build_pack
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.scheduler import Scheduler
from rewardserve.models.kv_pool import KVPool
from rewardserve.types import EncodedGroup
from rewardserve_kernels.attention import chunked, triton
from scoring import pack as ids

graphs.MAX_POOLED, graphs.MAX_SEGMENTS, graphs.MAX_TABLE = 8, 8, 64
NUM_BLOCKS = 16
loaded = load_runner(NativeOptions(sys.argv[1], num_threads=1, prefix_cache_bytes=1 << 24, compile="off"))
model, backbone = loaded.model, loaded.model.backbone
assert loaded.info.path == "packed", loaded.info.path_reason


def poisoned():
    pool = KVPool(NUM_BLOCKS + 1)
    pool.allocate_like(loaded.runner._pool)
    for pair in pool._layers:
        for tensor in pair:
            tensor.fill_(float("nan"))
    return pool


scheduler = Scheduler(PrefixCache(BlockPool(NUM_BLOCKS)), 120, 8)
common = list(range(3, 133))
groups = [(common + [5] * 3, [[7] * 20, [8], [9] * 33]), (common + [6, 4], [[7] * 9, [1] * 40]), ([11, 12], [[13]])]
for number, (prompt, responses) in enumerate(groups):
    group = EncodedGroup(ids(prompt), tuple(map(ids, responses)))
    scheduler.add(EngineRequest(str(number), (group,)))

plain, eager, fixed = poisoned(), poisoned(), poisoned()
step, num_filled, num_steps = None, 0, 0
while (plan := scheduler.schedule()) is not None:
    backbone.attention = chunked
    wanted = model.features_packed(build_pack(plan, backbone, for_gpu=False), plain)
    backbone.attention = triton
    got = model.features_packed(build_pack(plan, backbone, for_gpu=True), eager)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6), (got, wanted)
    if step is None and plan.num_scored:  # the model has met all its kinds of attention
        step = graphs.StaticStep(model, fixed, 128, spare_block=NUM_BLOCKS)
    pack = build_pack(plan, backbone, for_gpu=True)
    if step is not None and step.fill(pack):
        num_filled += 1
        got = step.compute()[: plan.num_scored]
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6), (got, wanted)
    else:  # as the server does: what no graph holds runs kernel by kernel
        got = model.features_packed(pack, fixed)
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6), (got, wanted)
    num_steps += 1
    scheduler.complete(plan, wanted.tolist())
for layer, (ours, theirs) in enumerate(zip(fixed._layers, plain._layers, strict=True)):
    for one, other in zip(ours, theirs, strict=True):
        one, other = one[:NUM_BLOCKS], other[:NUM_BLOCKS]
        assert torch.equal(one.isnan(), other.isnan()), "something was stored elsewhere"
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True), layer
print(num_steps, num_filled)
"""


def test_scores_and_stored_keys_are_those_of_the_plain_path(tmp_path: Path) -> None:
    """gemma2: layers with and without a window, softcaps, groups of heads."""
    save_checkpoint(tmp_path, "gemma2", torch.float32)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=170
    )
    assert done.returncode == 0, done.stderr[-3000:]
    num_steps, num_filled = map(int, done.stdout.split()[-2:])
    assert num_steps >= 3 and num_filled >= 2
