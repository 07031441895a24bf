"""The parts of benchmarks/gpu/run.py, each a process: `parts.py NAME FOLDER DEVICE SIZE`.

It imports what it needs, touching no device, and waits for a line with the seconds after which it is stopped; without
one it ends. Writes FOLDER/NAME.json. SIZE is whole or tiny.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from compile_ahead import compile_ahead
from engine_checks import engine_checks
from family_checks import family_checks
from fp8_figures import fp8
from hugging_face import hugging_face
from invariance import invariance
from kernel_checks import kernel_checks
from kernel_figures import kernels
from machine import machine
from model_figures import model
from part import Part
from rewardserve.engine.native.gpu import find_place_for_kernels
from tuning_sweep import tunings

PARTS: dict[str, Callable[[Part], None]] = {
    "machine": machine,
    "compile": compile_ahead,
    "gate kernels": kernel_checks,
    "gate families": family_checks,
    "gate engine": engine_checks,
    "kernels": kernels,
    "qwen3-0.6b": lambda part: model(part, "qwen3-0.6b"),
    "qwen3-4b": lambda part: model(part, "qwen3-4b"),
    "llama-3.1-8b": lambda part: model(part, "llama-3.1-8b"),
    "hugging face": hugging_face,
    "fp8": lambda part: fp8(part, "llama-3.1-8b"),
    "invariance": invariance,
    "tunings": tunings,
}


if __name__ == "__main__":
    name, folder, device, size = sys.argv[1:]
    find_place_for_kernels()
    if seconds := sys.stdin.readline():
        PARTS[name](Part(name, Path(folder), device, size == "tiny", float(seconds)))
