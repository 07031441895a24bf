"""What a GPU computes on, run on a CPU: Triton attention under its interpreter, all rows stored at once, padded tiles,
inputs at fixed places, page tables. Scores are those of the plain path."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapters import TARGETS, adapter_of, save_adapter
from checkpoints import save_checkpoint
from forks import Forks
from safetensors.torch import load_file

# Of MKL and of torch's own loops, on every CPU: with AVX-512 a score of 1.3 among scores of 13 came out 1.5e-5 off.
ONE_PATH = {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
pytest.importorskip("triton", reason="triton is not installed")

IMPORTS = """
import scoring, torch
from rewardserve.engine.native import batch, graphs, load, runner, scheduler
from rewardserve_kernels.attention import chunked, triton
from rewardserve_kernels.kv_cache import triton
"""
PROGRAM = """
import sys
import torch
from rewardserve.engine.base import EngineRequest
from rewardserve.engine.native import graphs
from rewardserve.engine.native.batch import build_pack, lay_end_to_end
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.runner import PackedRunner
from rewardserve.engine.native.scheduler import Scheduler
from rewardserve.models.kv_pool import KVPool
from rewardserve.models.reads import Reader
from rewardserve.types import EncodedGroup
from rewardserve_kernels.attention import chunked, triton
from rewardserve_kernels.kv_cache import triton as kv_cache
from scoring import pack as ids

graphs.MAX_READS, graphs.MAX_SEGMENTS, graphs.MAX_TABLE = 8, 8, 64
NUM_BLOCKS = 16
source, *beside = sys.argv[1:]
options = NativeOptions(source, beside=tuple(beside), num_threads=1, prefix_cache_bytes=1 << 24, compile="off")
loaded = load_runner(options)
model, backbone = loaded.model, loaded.model.backbone
assert loaded.info.path == "packed", loaded.info.path_reason


def poisoned():
    pool = KVPool(NUM_BLOCKS + 1)
    pool.allocate_like(loaded.runner._pool)
    for pair in pool._layers:
        for tensor in pair:
            tensor.fill_(float("nan"))
    if model.takes_mean:
        pool.keep_sums(backbone.config.hidden_size, backbone.device)
        pool.sums.fill_(float("nan"))
    return pool


class Replay:
    # What a CUDA graph does: the same once more, from where its inputs lie to where its outputs lie.
    num_replays = 0

    def __init__(self, step):
        self.step, self.hidden = step, step.compute().clone()

    def replay(self):
        self.num_replays += 1
        self.hidden.copy_(self.step.compute())


readers = [Reader(plan) for plan in loaded.reads]
scheduler = Scheduler(PrefixCache(BlockPool(NUM_BLOCKS)), 120, 8, readers=readers, trunks=loaded.trunks)
common = list(range(3, 133))
groups = [(common + [5] * 3, [[7] * 20, [8], [9] * 33]), (common + [6, 4], [[7] * 9, [1] * 40]), ([11, 12], [[13]])]
for variant in range(len(sys.argv) - 1):
    for number, (prompt, responses) in enumerate(groups):
        group = EncodedGroup(ids(prompt), tuple(map(ids, responses)))
        scheduler.add(EngineRequest(f"{variant} {number}", (group,), variant=variant))

backbone.store_rows = kv_cache.store_rows  # what the plain path has no use for
plain, eager, fixed = poisoned(), poisoned(), poisoned()
server, num_steps, variants = None, 0, set()
while (plan := scheduler.schedule()) is not None:
    model.use(plan.variant)
    backbone.attention = chunked
    rows = lay_end_to_end(plan)
    wanted = model.features_packed(build_pack(rows, backbone, False, model.takes_mean), plain)
    backbone.attention = triton
    got = model.features_packed(build_pack(rows, backbone, True, model.takes_mean), eager)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6), (got, wanted)
    if server is None and plan.num_scored:  # the model has met all its kinds of attention
        step = graphs.StaticStep(model, fixed, 128, spare_block=NUM_BLOCKS)
        graph = Replay(step)
        held = graphs.Graphs(model, fixed, [graphs.Captured(step, graph, graph.hidden)])
        server = PackedRunner(model, fixed, NUM_BLOCKS, held)
    if server is None:
        got = model.features_packed(build_pack(rows, backbone, True, model.takes_mean), fixed)
    else:
        model.use(0)  # the plan says which one
        before = graph.num_replays
        got = torch.tensor(server.launch(server.prepare(plan)).features())
        if graph.num_replays > before:
            variants.add(plan.variant)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6), (got, wanted)
    num_steps += 1
    scheduler.complete(plan, wanted.tolist())
pairs = list(zip(fixed._layers, plain._layers, strict=True))
for layer, (ours, theirs) in enumerate(pairs + [([fixed.sums], [plain.sums])] * model.takes_mean):
    for one, other in zip(ours, theirs, strict=True):
        one, other = one[:NUM_BLOCKS], other[:NUM_BLOCKS]
        assert torch.equal(one.isnan(), other.isnan()), "something was stored elsewhere"
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True), layer
print(num_steps, graph.num_replays, len(variants))
"""


Run = Callable[..., tuple[int, ...]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Folders -> steps, those that were replayed, models among these. PROGRAM compares scores and stored keys."""
    with Forks(IMPORTS, {**ONE_PATH, "TRITON_INTERPRET": "1"}) as forks:
        yield lambda *folders: tuple(map(int, forks.run(PROGRAM, *map(str, folders)).split()[-3:]))


def test_scores_and_stored_keys_are_those_of_the_plain_path(run: Run, tmp_path: Path) -> None:
    """gemma2: layers with and without a window, softcaps, groups of heads."""
    save_checkpoint(tmp_path, "gemma2", num_hidden_layers=2)
    num_steps, num_replays, _ = run(tmp_path)
    assert num_steps >= 3 and num_replays >= 2


def test_means_are_those_of_the_plain_path(run: Run, tmp_path: Path) -> None:
    """All rows are what they are made of, and sums of stored ones are kept beside their keys."""
    save_checkpoint(tmp_path, num_hidden_layers=2)
    (tmp_path / "rewardserve.toml").write_text('[head]\nkind = "linear"\nweights = "score"\n[read]\nat = "mean"\n')
    num_steps, num_replays, _ = run(tmp_path)
    assert num_steps >= 3 and num_replays >= 2


def test_models_over_one_backbone_share_its_graphs(run: Run, tmp_path: Path) -> None:
    """One captured with the first one's adapter computes with that of the model in use, and each head is its own."""
    save_checkpoint(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    names = {"lora": TARGETS, "other": TARGETS[1:], "head": ()}
    for name, targets in names.items():
        save_adapter(tmp_path / name, tmp_path / "base", adapter_of(weights, targets=targets, seed=name))
    *_, num_variants = run(*(tmp_path / name for name in names))
    assert num_variants == len(names)
