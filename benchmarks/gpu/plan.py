"""What is run, in which order, and how long it may take. Imports nothing that takes time."""

from dataclasses import dataclass

# What a server's engine sets before its first product (engine/native/gpu.py). torch reads them once in a process, and
# in these processes something is measured before the engine starts.
AS_SERVED = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}


@dataclass(frozen=True, slots=True)
class Planned:
    name: str
    expected_s: float  # on an H200 with 16 cores; not measured yet (benchmarks/NOTES.md says where it comes from)
    most_s: float  # then it is stopped; in all they may take longer than there is time, for few take their most
    as_served: bool = False  # with AS_SERVED in its environment


# Stages, in the order of what is most worth knowing; the parts of one run at the same time.
STAGES: tuple[tuple[Planned, ...], ...] = (
    (Planned("machine", 15, 60),),
    (Planned("compile", 33, 90),),
    (
        Planned("gate kernels", 12, 120),
        Planned("gate families", 45, 120),
        Planned("gate engine", 82, 160, as_served=True),
    ),
    (Planned("kernels", 17, 60),),
    (Planned("qwen3-0.6b", 67, 120, as_served=True),),
    (Planned("qwen3-4b", 67, 120, as_served=True),),
    (Planned("llama-3.1-8b", 67, 120, as_served=True),),
    (Planned("hugging face", 27, 70),),
    (Planned("fp8", 52, 100, as_served=True),),
    (Planned("invariance", 32, 70),),
    (Planned("tunings", 25, 150),),  # ends by itself when its time is over
)
NAMES = tuple(part.name for stage in STAGES for part in stage)
GATE = tuple(name for name in NAMES if name.startswith("gate "))
FIRST = "machine"  # every share is one of its rates


def chosen(words: list[str]) -> set[str]:
    """Names of parts, of which a first word is enough ("gate": all three). Raises ValueError for what is none."""
    names = {name for name in NAMES for word in words if name == word or name.startswith(f"{word} ")}
    if unknown := [word for word in words if not any(n == word or n.startswith(f"{word} ") for n in NAMES)]:
        raise ValueError(f"{', '.join(unknown)}: no such part; there are {', '.join(NAMES)}")
    return {FIRST, *names}
