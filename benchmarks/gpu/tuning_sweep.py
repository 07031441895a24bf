"""Tunings of attention that might be better than those it has. What there is no time for is left out."""

import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attention_case import Case, said
from compile_ahead import compile_all
from kernel_checks import attention_is_right
from kernel_figures import BEST_OF_16, PACKS, TINY_PACKS, Attention, cases, shapes
from kernels_of import attention_kernel
from part import Part

LEAST_S = 8.0  # for a last word: the best ones are checked


def tunings(part: Part) -> None:
    """Compiled on all cores, shape by shape, then measured on the shape that best-of-n has."""
    found: dict[str, Any] = {}
    if not hasattr(attention_kernel(part), "Tuning"):
        part.note(tunings=found, why="attention on a CPU has none")
        return
    for shape, case in zip(shapes(part), cases(part), strict=True):
        if part.left() < LEAST_S + 25:  # a round of compiling takes so long
            part.note(ended=f"no time was left for {shape} and what comes after it")
            return
        found[shape] = {"tflops": {}, "failed": {}}
        tried = [replace(case, tuning=tuning) for tuning in _tunings(part)]
        compile_all(part, [("attention", each) for each in tried])
        _measure(part, tried, found[shape])
        part.note(tunings=found)
        part.say(f"tunings of {shape}: {found[shape]}")


def _measure(part: Part, tried: list[Case], found: dict[str, Any]) -> None:
    sizes = tried[0].heads, tried[0].kv_heads, tried[0].head_size
    (tiny,) = TINY_PACKS.values()
    attention = Attention(part, *sizes, *(tiny if part.tiny else PACKS[BEST_OF_16]))
    for case in tried:
        if part.left() < LEAST_S:
            found["ended"] = "no time was left for the rest"
            break
        try:
            found["tflops"][said(case.tuning)] = attention.rate(tuning=case.tuning)
        except Exception:  # more shared memory or registers than there are
            found["failed"][said(case.tuning)] = traceback.format_exc(limit=-2)
    if not found["tflops"]:
        return
    best = max(found["tflops"], key=found["tflops"].__getitem__)
    case = next(each for each in tried if said(each.tuning) == best)
    ok, detail = attention_is_right(part, case)
    found["best"] = {"tuning": best, "tflops": found["tflops"][best], "right": ok, "detail": detail}


def _tunings(part: Part) -> Iterator[Any]:
    """With three stages or more: of two, no copy is under way while there is something to multiply. Tiles of 128 lanes
    also with as few registers as let two of them be on a multiprocessor, where one begins while the other is busy.
    """
    kernel = attention_kernel(part)
    for block_m, num_warps in ((64, 4),) if part.tiny else ((64, 4), (128, 8)):
        for block_n in (64,) if part.tiny else (32, 64, 128):
            for num_stages in (3,) if part.tiny else (3, 4):
                yield kernel.Tuning(block_m, block_n, num_warps, num_stages)
    if not part.tiny:
        for num_stages in (3, 4):
            yield kernel.Tuning(128, 32, 8, num_stages, max_registers=128)
