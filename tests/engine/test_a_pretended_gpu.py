"""The engine as it runs on a GPU, on one that is pretended (tests/support/pretend_gpu.py): pinned copies, two forwards
under way, Triton's kernels, captured graphs, a second tier in host memory, the second of two devices."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from forks import Forks

pytest.importorskip("triton", reason="triton is not installed")

IMPORTS = """
import asyncio, json, sys
import pretend_gpu, scoring, torch
from rewardserve.engine.native import engine, graphs, load
from rewardserve_kernels.attention import triton
"""
# What is pretended is so for good.
BEGIN = """
import asyncio, json, sys
import pretend_gpu
import torch
from rewardserve.engine.native import graphs
from rewardserve_kernels.attention import triton

pretend_gpu.pretend()
graphs.MAX_READS, graphs.MAX_SEGMENTS, graphs.MAX_TABLE = 8, 8, 64
graphs.BUCKETS, graphs.WARM_UPS = (128,), 1
triton.TUNINGS_32_BIT = {((8, 0), 256): triton.Tuning(64, 128, 4, 1)}  # fewer steps for the interpreter
"""
SCORES = """
from scoring import native

groups = [([5 + n] * 140 + [1, 2, 3], [[7] * 20, [8], [9] * 33]) for n in range(2)] + [([11, 12], [[13]])]


async def scored(folder, device, options):
    async with native(folder, device=device, compile="off", max_batch_tokens=512, **options) as scorer:
        loaded, on_gpu = scorer.engine._loop._loaded, device != "cpu"
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        found = {"path": loaded.info.path, "device": loaded.info.device}
        found["triton"] = loaded.model.backbone.attention is triton
        found["sums in one order"] = bool(loaded.model.backbone.compile_options)
        scores = [await scorer.scores(groups)]  # cold and at once, which no graph holds
        replays = pretend_gpu.launches["graph"]
        scores += [await scorer.scores([group]) for group in groups]  # warm and one by one
        found["replays"] = pretend_gpu.launches["graph"] - replays
        pretend_gpu.launches.clear()
        scores.append(await scorer.scores(groups[-1:]))  # warm: one step
        found["launches"] = dict(pretend_gpu.launches)
        found["copies"] = [found["launches"].pop("copy to the device", 0)]
        loaded.runner._graphs = None
        pretend_gpu.launches.clear()
        scores.append(await scorer.scores(groups[-1:]))  # kernel by kernel
        found["copies"].append(pretend_gpu.launches["copy to the device"])
        torch.cuda.set_sync_debug_mode("default")
        return found, torch.cat(scores)


for folder, device, options in json.loads(sys.argv[1]):
    _, wanted = asyncio.run(scored(folder, "cpu", {}))
    found, got = asyncio.run(scored(folder, device, options))
    print(json.dumps(found | {"error": float((got - wanted).abs().max() / wanted.abs().max())}))
"""
HOST_TIER = """
from rewardserve.models.kv_pool import HostBlocks, KVPool

met, pool = KVPool(1), KVPool(4)
met.layer(0, *(torch.zeros(2, 1, 8, device="cuda") for _ in range(2)))
pool.allocate_like(met)
pool.keep_sums(16, torch.device("cuda"))
host = HostBlocks(pool, num_slots=2)
pool.whole[:, :, 1], pool.sums[1] = 7, 5
torch.cuda.set_sync_debug_mode("error")
host.copy_out(1, slot=0)
pool.whole.zero_(), pool.sums.zero_()
host.copy_back(3, slot=0)
torch.cuda.set_sync_debug_mode("default")
print(json.dumps([t.flatten(1).mean(1).tolist() for t in (pool.whole[0, 0], pool.sums)]))
"""

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}


Run = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """A program behind BEGIN, with its arguments -> what it prints, a line each."""
    with Forks(IMPORTS, {"TRITON_INTERPRET": "1"}) as forks:
        yield lambda program, *arguments: list(map(json.loads, forks.run(BEGIN + program, *arguments).splitlines()))


def test_scores_are_those_of_a_cpu_and_no_step_waits(run: Run, tmp_path: Path) -> None:
    """gemma2: windows and softcaps; gpt2: a class that looks for padding in every forward; qwen3: means, so sums beside
    keys, and a rotary embedding that looks in every forward whether it is to change.

    One copy to the device, of what a graph holds and of what goes kernel by kernel. Means apart, a graph takes four
    launches: that copy, the graph, norm and head, one copy back.
    """
    cases = []
    for family in ("gemma2", "gpt2", "qwen3"):
        rope = {"rope_parameters": DYNAMIC} if family == "qwen3" else {}
        save_checkpoint(tmp_path / family, family, num_hidden_layers=2, pad_token_id=3, **rope)
        cases.append((str(tmp_path / family), "cuda", {}))
    said = '[head]\nkind = "linear"\nweights = "score"\n[read]\nat = "mean"\n'
    (tmp_path / "qwen3" / "rewardserve.toml").write_text(said)
    cases[-1] = (str(tmp_path / "qwen3"), "cuda:1", {})
    for (folder, device, _), found in zip(cases, run(SCORES, json.dumps(cases)), strict=True):
        assert found["error"] < 1e-5, folder
        assert (found["path"], found["device"], found["triton"]) == ("packed", device, True), folder
        assert found["sums in one order"], folder  # test_layers_compile_for_a_gpu.py
        assert found["replays"] >= 3 and found["copies"] == [1, 1], folder
        if folder != str(tmp_path / "qwen3"):  # the inputs, the graph, norm and head, the features
            assert found["launches"] == {"copy_": 2, "graph": 1, "score_last_rows": 1}, folder


def test_a_block_that_was_away_in_host_memory_is_what_it_was_and_nobody_waited(run: Run) -> None:
    assert run(HOST_TIER) == [[[0, 0, 0, 7], [0, 0, 0, 5]]]


WRONG = """
def refused(action):
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return str(error)


def captured(action):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        action()


def launched_from_another_device():
    from rewardserve_kernels.pooling.triton import pool_head
    torch.cuda.set_device(1)
    pool_head(here, torch.zeros(1, 2, dtype=torch.int32, device="cuda:0"), here)


here, there, host = torch.ones(3, 4, device="cuda"), torch.ones(3, 4, device="cuda:1"), torch.ones(3, 4)
wrong = {
    "two devices": lambda: here + there,
    "device and host": lambda: here + host,
    "a device that is not there": lambda: torch.empty(1, device="cuda:2"),
    "a wait in a graph": lambda: captured(lambda: here.sum().item()),
    "another device's launch": launched_from_another_device,
}
waiting = {
    "a number": lambda: here.sum().item(),
    "a condition": lambda: bool(here.sum() > 1),
    "a mask": lambda: here[here > 0],
    "a copy back": lambda: here.cpu(),
    "a copy that is not pinned": lambda: host.to("cuda", non_blocking=True),
    "a copy that waits": lambda: host.pin_memory().to("cuda"),
    "a list": lambda: torch.tensor([1, 2], device="cuda"),
}
print(json.dumps({name: refused(action) for name, action in wrong.items()}))
torch.cuda.set_device(0)
print(json.dumps({name: refused(action) for name, action in waiting.items()}))  # nobody minds
torch.cuda.set_sync_debug_mode("error")
print(json.dumps({name: refused(action) for name, action in waiting.items()}))
fine = lambda: here[1:].add_(host.pin_memory().to("cuda", non_blocking=True)[0])
print(json.dumps({"fine": refused(fine)}))
graph, given = torch.cuda.CUDAGraph(), torch.zeros(2, device="cuda")
with torch.cuda.graph(graph):
    doubled = given * 2
given.fill_(4)
graph.replay()
torch.cuda.set_sync_debug_mode("default")
print(json.dumps(doubled.tolist()))
"""


def test_what_a_gpu_would_refuse_is_refused_here(run: Run) -> None:
    """Or the test above would say nothing."""
    wrong, unminded, minded, fine, replayed = run(WRONG)
    assert all(wrong.values()), wrong
    assert not any(unminded.values()), unminded
    assert all(minded.values()), minded
    assert fine == {"fine": None}
    assert replayed == [8.0, 8.0]


NOT_CAPTURED = """
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import LoadFailed
from rewardserve.models.reward_model import RewardModel

compute, (folder, mode) = RewardModel.hidden_packed, json.loads(sys.argv[1])


def waits(self, pack, pool):
    hidden = compute(self, pack, pool)
    if mode == "the host waits" or pretend_gpu._capture() is not None:
        hidden.sum().item()
    return hidden


def differs(self, pack, pool):
    return compute(self, pack, pool) + 3.0 * (pretend_gpu._capture() is not None)


RewardModel.hidden_packed = differs if mode == "a replay differs" else waits
found = {}
try:
    loaded = load_runner(NativeOptions(folder, device="cuda", compile="off", max_batch_tokens=128))
    found |= {"path": loaded.info.path, "graphs": loaded.runner._graphs is not None}
except LoadFailed as error:
    found["refused"] = str(error)
found["default stream"] = torch.cuda.current_stream() is pretend_gpu.DEFAULT_STREAM
print(json.dumps(found))
"""


@pytest.mark.parametrize("mode", ["the host waits", "a replay differs", "the capture fails"])
def test_what_cannot_be_captured_is_found_out_before_anything_is_served(run: Run, tmp_path: Path, mode: str) -> None:
    """And on its usual stream: steps on another would run beside the copies of their own inputs."""
    save_checkpoint(tmp_path, "qwen3", num_hidden_layers=2)
    (found,) = run(NOT_CAPTURED, json.dumps([str(tmp_path), mode]))
    assert found["default stream"]
    if mode == "the capture fails":
        assert "--no-cuda-graphs" in found["refused"]
    else:
        assert (found["path"], found["graphs"]) == ("packed", False)


SIZES = """
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import LoadFailed
from rewardserve.models.reward_model import RewardModel

compute, sizes, MB = RewardModel.features_packed, [], 1 << 20


def taking(self, pack, pool):
    sizes.append(len(pack.input_ids))
    if sizes[-1] > 400:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return compute(self, pack, pool)


RewardModel.features_packed = taking
torch.cuda.max_memory_allocated = lambda device=None: 20 * MB  # of the 64 that are free
for options in ({"max_batch_tokens": 500}, {"prefix_cache_bytes": 50 * MB}, {"prefix_cache_bytes": 40 * MB}, {}):
    sizes.clear()
    options = {"max_batch_tokens": 300, **options}
    try:
        loaded = load_runner(NativeOptions(sys.argv[1], device="cuda", compile="off", cuda_graphs=False, **options))
        print(json.dumps([max(sizes), loaded.runner._pool.whole.nbytes / MB]))
    except LoadFailed as error:
        print(json.dumps(str(error)))
"""


def test_the_largest_step_is_tried_at_load_and_what_leaves_it_no_room_is_refused(run: Run, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3", num_hidden_layers=1)
    too_large, too_much, asked, by_itself = run(SIZES, str(tmp_path))
    assert "max_batch_tokens = 500 does not fit" in too_large
    assert "50 MB does not fit" in too_much and "--prefix-cache-mb 44," in too_much
    assert asked[0] == by_itself[0] == 300
    assert asked[1] == pytest.approx(40, abs=0.2)
    assert by_itself[1] == pytest.approx(0.6 * 64, abs=0.2), "the prefix cache is sized by what is free"


HOST_TIER_AT_LOAD = """
import logging
from rewardserve.engine.native import host_tier
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions

said = []
host_tier.log.addHandler(handler := logging.Handler())
host_tier.log.setLevel(logging.INFO)
handler.emit = lambda record: said.append([record.levelname, record.getMessage()])


def seconds(action, taken=iter([0.008, 0.064, 0.008, 0.001])):  # of eight blocks, and of 256 tokens
    action()
    return next(taken)


host_tier._seconds = seconds
for _ in range(2):
    load_runner(
        NativeOptions(
            sys.argv[1],
            device="cuda",
            compile="off",
            cuda_graphs=False,
            max_batch_tokens=256,
            host_cache_bytes=1 << 20,
            prefix_cache_bytes=1 << 20,
        )
    )
print(json.dumps(said))
"""


def test_a_host_tier_that_costs_time_is_warned_of_at_load(run: Run, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3", num_hidden_layers=1)
    ((useful, harmful),) = run(HOST_TIER_AT_LOAD, str(tmp_path))
    assert useful == [
        "INFO",
        "128 tokens of a prompt are copied back from host memory in 1.00 ms and computed in 32.00 ms",
    ]
    assert harmful[0] == "WARNING" and harmful[1].endswith("this model is faster without --host-cache-mb")
