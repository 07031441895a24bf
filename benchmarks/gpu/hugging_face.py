"""What a plain forward of padded batches of 8 reaches: in the order in which pairs come, and sorted by length.

In a process of its own: where our engine runs, products are set up otherwise (engine/native/gpu.py).
"""

import gc
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import random_model
import torch
from limits import machine_rates
from part import Part
from served import ROUND_TOKENS, TINY, TRAFFIC, RandomWeights, groups_of, vocabulary
from work import ModelShape, shared

BATCH = 8
MODELS = ("qwen3-0.6b", "qwen3-4b", "llama-3.1-8b")
LEAST_S = 15.0  # of one model


def hugging_face(part: Part) -> None:
    found: dict[str, Any] = {}
    for name in (TINY,) if part.tiny else MODELS:
        if part.left() < LEAST_S:
            part.note(ended=f"no time was left for {name}")
            return
        try:
            found[name] = _measure(part, name)
        except torch.OutOfMemoryError:
            found[name] = {"failed": "it did not fit"}
        part.note(hugging_face=found)
        part.say(f"{name}: {found[name]}")
        gc.collect()
        if part.on_gpu:
            torch.cuda.empty_cache()


def _measure(part: Part, name: str) -> dict[str, Any]:
    config = random_model._config(name, vocabulary(part))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        shape = ModelShape.of(Path(folder))
    limit = machine_rates(part, shape)
    RandomWeights.device = part.device
    model = RandomWeights.from_pretrained(None, config, torch.bfloat16)[0].eval()
    found: dict[str, Any] = {}
    for workload in ("best_of_16", "shared_system"):
        groups = groups_of(part, TRAFFIC[workload], ROUND_TOKENS[name] // 10, seed=7)
        rows = [[*prompt, *response] for prompt, responses in groups for response in responses]
        _forward(part, model, rows[:BATCH])  # what the first one sets up
        for order, these in (("as they come", rows), ("sorted", sorted(rows, key=len))):
            started = time.perf_counter()
            _forward(part, model, these)
            seconds = time.perf_counter() - started
            found[f"{workload}, {order}"] = {
                "pairs_per_s": len(rows) / seconds,
                "share_of_limit": limit.least_seconds(shape, shared(rows)) / seconds,
            }
    return found


def _forward(part: Part, model: Any, rows: Sequence[list[int]]) -> None:
    with torch.inference_mode():
        for i in range(0, len(rows), BATCH):
            batch = rows[i : i + BATCH]
            ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, of_row, kept in zip(batch, ids, mask, strict=True):
                of_row[: len(row)] = torch.tensor(row)
                kept[: len(row)] = 1
            model(input_ids=ids.to(part.device), attention_mask=mask.to(part.device), use_cache=False)
    part.wait()
