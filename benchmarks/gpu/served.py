"""Models with random weights, served on a part's device, and random traffic for them.

They are made on the device, in true shapes: only their config and their head are on disk.
"""

import asyncio
import contextlib
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import random_model
import torch
from part import Part
from rewardserve.engine.base import EngineListener, EngineRequest, EngineResult
from rewardserve.engine.native import graphs as captures
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.load import MAX_PARAMETERS_FOR_GRAPHS, Loaded
from rewardserve.engine.native.options import NativeOptions
from rewardserve.models import loader
from rewardserve.models.heads import LinearHead
from rewardserve.models.reward_model import RewardModel
from rewardserve.types import EncodedGroup
from safetensors.torch import save_file
from torch._dynamo.utils import counters

VOCAB_SIZE = 32_000
TINY = "qwen3-tiny"
ITS_OWN_LAYERS = "a head of layers of its own"
ROOMS = {"attention": "attention", "storing": "kv_cache", "pooling": "pooling"}  # of a GPU's kernels


@dataclass(frozen=True, slots=True)
class Traffic:
    """Groups of random ids. Lengths are log-normal about those given, or just those where `spread` is 0."""

    prompt: int  # tokens
    responses: int
    tokens: int  # of each response
    spread: float = 0.0  # standard deviation of the logarithm of a length
    system: int = 0  # tokens that all groups begin with


LONGEST = 6.0  # times the median: where the real ones end
# There is neither text nor tokenizer where this runs. What is real text in benchmarks/run.py has the number, the median
# and the spread of its lengths here (4.4 characters a token); best_of_16 is the shape that predictions were made for.
TRAFFIC = {
    "best_of_16": Traffic(512, 16, 256),
    "shared_system": Traffic(23, 16, 166, spread=1.0, system=600),
    "pairs": Traffic(70, 2, 29, spread=1.0),
    "ppo": Traffic(256, 1, 512),
    "grpo_64": Traffic(1024, 64, 1024),
    "short_items": Traffic(120, 10, 180),
}
# Tokens of one round, prompts once: a second or two at the rates foreseen (benchmarks/NOTES.md).
ROUND_TOKENS = {"qwen3-0.6b": 400_000, "qwen3-4b": 130_000, "llama-3.1-8b": 70_000, TINY: 1_500}


class RandomWeights:
    """Stands in for AutoModel: what the config describes, made on the device."""

    device: torch.device

    @staticmethod
    def from_config(config: Any) -> Any:
        from transformers import AutoModel

        return AutoModel.from_config(config)

    @classmethod
    def from_pretrained(cls, folder: object, config: Any, dtype: torch.dtype, **_: Any) -> tuple[Any, dict[str, Any]]:
        from transformers import AutoModel

        torch.manual_seed(0)
        with torch.device(cls.device):
            module = AutoModel.from_config(config, dtype=dtype)
        return module, {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}


def vocabulary(part: Part) -> int:
    return 2000 if part.tiny else VOCAB_SIZE


@contextlib.contextmanager
def made_model(part: Part, name: str) -> Iterator[str]:
    """A folder that loads as the model of that name."""
    config = random_model._config(name, vocabulary(part))
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(1, config.hidden_size, generator=generator) / config.hidden_size**0.5
    RandomWeights.device = part.device
    real, loader.AutoModel = loader.AutoModel, RandomWeights  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForSequenceClassification"]
        config.dtype = "bfloat16"
        config.save_pretrained(folder)
        save_file({"score.weight": head.bfloat16()}, Path(folder) / "model.safetensors")
        try:
            yield folder
        finally:
            loader.AutoModel = real


def engine_options(part: Part, folder: str, **options: Any) -> NativeOptions:
    """Of a model in bf16: random weights on the device say nothing of the precision that they are stored in."""
    small = {"prefix_cache_bytes": 16 << 20, "max_batch_tokens": 1024} if part.tiny else {}
    if not part.on_gpu and options.get("compile") == "off":
        options["compile"] = "auto"  # layers as small as here stay as they are, and attention takes a fifth of the time
    return NativeOptions(folder, device=str(part.device), **{"dtype": "bfloat16", **small, **options})


@contextlib.asynccontextmanager
async def running(part: Part, folder: str, **options: Any) -> Any:
    """An engine that runs as it is meant to; where it would not there is only a warning, and other figures."""
    asked = engine_options(part, folder, path="packed", **options)
    engine = NativeEngine(asked)
    await engine.start(EngineListener())
    try:
        require_meant(part, asked, how_it_runs(loaded_of(engine)))
        yield engine
    finally:
        await engine.stop()


def loaded_of(engine: NativeEngine) -> Loaded:
    assert engine._loop is not None
    return engine._loop._loaded


def how_it_runs(loaded: Loaded) -> dict[str, Any]:
    """Which of the ways there are, of each thing that could silently be another."""
    model, backbone = loaded.model, loaded.model.backbone
    runner: Any = loaded.runner
    graphs = getattr(runner, "_graphs", None)
    return {
        "path": loaded.info.path,
        "dtype": loaded.info.dtype,
        "parameters": loaded.info.num_parameters,
        "attention": getattr(backbone.attention, "__name__", "none"),
        "storing": backbone.store_rows.__module__,
        "pooling": _pooling(model),
        "pruned": backbone._pruned,
        "compiled": any(layer._compiled_call_impl is not None for layer in backbone.decoder_layers),
        "graphs": 0 if graphs is None else len(graphs._captured),
        "compiled_so_far": counters["stats"]["unique_graphs"],  # in this process; more than two a model: a recompile
    }


def _pooling(model: RewardModel) -> str:
    if not model.takes_mean and not isinstance(model.head, LinearHead):
        return ITS_OWN_LAYERS
    return getattr(model._sum_pieces if model.takes_mean else model._pool_head, "__module__", "none")


def require_meant(part: Part, options: NativeOptions, runs: dict[str, Any]) -> None:
    """Raises RuntimeError where it runs in another way than `options` and a GPU make it: what was found is not ours."""
    meant: dict[str, Any] = {"path": "packed"}
    if part.on_gpu:
        graphs = len(captures.BUCKETS) if options.cuda_graphs and runs["parameters"] <= MAX_PARAMETERS_FOR_GRAPHS else 0
        meant |= {kind: f"rewardserve_kernels.{room}.triton" for kind, room in ROOMS.items()}
        if runs["pooling"] == ITS_OWN_LAYERS:
            del meant["pooling"]
        meant |= {"compiled": options.compile != "off", "graphs": graphs}
    other = {kind: runs[kind] for kind, how in meant.items() if runs[kind] != how}
    require(not other, f"it does not run as meant: {other} instead of { ({kind: meant[kind] for kind in other}) }")


_numbers = iter(range(10**9))


async def score(
    engine: NativeEngine, groups: Sequence[tuple[list[int], list[list[int]]]], variant: int = 0
) -> EngineResult:
    """All at once, each group a request of its own; the result is theirs together."""
    encoded = [EncodedGroup(as_bytes(prompt), tuple(map(as_bytes, responses))) for prompt, responses in groups]
    requests = [EngineRequest(str(next(_numbers)), (group,), variant=variant) for group in encoded]
    results = await asyncio.gather(*(engine.score(request) for request in requests))
    return EngineResult(tuple(group for result in results for group in result.groups), 0.0, 0.0)


def as_bytes(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


def scores_of(result: EngineResult) -> list[float]:
    failures = [item.failure for group in result.groups for item in group.items if item.failure]
    if failures:
        raise RuntimeError(f"{len(failures)} pairs have no score: {failures[0]}")
    return [item.score for group in result.groups for item in group.items if item.score is not None]


def require(holds: bool, message: str) -> None:
    """What a check would be worth nothing without."""
    if not holds:
        raise RuntimeError(message)


def groups_of(part: Part, traffic: Traffic, tokens: int, seed: int) -> list[tuple[list[int], list[list[int]]]]:
    """Of about so many tokens in all, what is common counted once; behind what all share no two prompts begin alike.

    Lengths are the same for every `seed`, so that rounds are of the same work; ids are not.
    """
    if part.tiny:
        smaller = {"prompt": traffic.prompt // 8, "tokens": traffic.tokens // 8, "system": traffic.system // 8}
        traffic = replace(traffic, responses=min(4, traffic.responses), **smaller)
    of_lengths, of_ids = np.random.default_rng(0), np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return of_ids.integers(10, vocabulary(part), length).tolist()

    def length(median: int) -> int:
        times = np.exp(traffic.spread * of_lengths.standard_normal()) if traffic.spread else 1.0
        return max(1, int(median * min(LONGEST, times)))

    groups: list[tuple[list[int], list[list[int]]]] = []
    system, left = ids(traffic.system), float(tokens - traffic.system)
    while True:
        prompt, *responses = length(traffic.prompt), *(length(traffic.tokens) for _ in range(traffic.responses))
        left -= prompt + sum(responses)
        if groups and left < -(prompt + sum(responses)) / 2:  # closer to so many without it
            return groups
        groups.append(([*system, *ids(prompt)], [ids(response) for response in responses]))
