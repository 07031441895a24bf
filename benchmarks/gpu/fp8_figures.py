"""Linear layers in 8 bits: what they gain on the largest model, and what they do to scores."""

import asyncio
from pathlib import Path

from limits import limits_of
from model_figures import throughput
from part import Part
from score_errors import RANDOM_WEIGHTS, compare, of_demo_model, probe
from served import ROUND_TOKENS, TINY, TRAFFIC, how_it_runs, loaded_of, made_model, running
from work import ModelShape


def fp8(part: Part, name: str) -> None:
    """After the part `name`, with whose figures and scores it compares."""
    model = TINY if part.tiny else name
    part.note(more={})
    asyncio.run(_scores(part))
    with made_model(part, model) as folder:
        asyncio.run(_speed(part, folder, model, part.of(name)))


async def _scores(part: Part) -> None:
    part.found["more"]["demo model against fp32"] = await of_demo_model(part)
    part.note()


async def _speed(part: Part, folder: str, model: str, in_bf16: dict) -> None:
    limits = limits_of(part, ModelShape.of(Path(folder)), fp8=True)
    more = part.found["more"]
    async with running(part, folder, quantize="fp8") as engine:
        part.note(runs=how_it_runs(loaded_of(engine)))
        result = await throughput(part, engine, TRAFFIC["best_of_16"], ROUND_TOKENS[model], limits)
        part.note(workloads={"best_of_16": result})
        scores = await probe(part, engine)
    if "probe" not in in_bf16:
        more["against bf16"] = "not compared: the model in bf16 came to no scores in this run"
    else:
        gain = result["pairs_per_s"] / in_bf16["workloads"]["best_of_16"]["pairs_per_s"]
        more["against bf16"] = {"gain": round(gain, 2), **compare(in_bf16["probe"], scores), "but": RANDOM_WEIGHTS}
    part.note()
