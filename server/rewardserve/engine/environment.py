"""What an engine's process has in its environment that this one need not: settings read once, when a process begins."""

from collections.abc import Mapping

# How long OpenMP's threads spin before they sleep, in turns. Its default is milliseconds, which is right for an engine
# that has its cores to itself (1.06 to 1.09 x as fast). Of engines on the same cores it takes what the others wait for:
# three on two cores needed 1,300 ms for a forward of 10, and 39 with this.
SPIN_BESIDE_OTHERS = {"GOMP_SPINCOUNT": "1000"}
SPIN_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# glibc's aligned allocation, which torch's is, asks for a little more than it needs and frees the rest. In a thread's
# cache, or among the fast bins, that rest never becomes one with what lies beside it: a piece that is freed is too
# small for the next of its own size, and a step takes up to 2.4 times the memory that it uses. Without them it is 1.3
# times, at the same speed. (As seen with glibc 2.36, a step of 4,096 tokens and 68 MiB of a 100M model.)
MALLOC = "GLIBC_TUNABLES"
NO_THREAD_CACHE = "glibc.malloc.tcache_count=0"


def engine_environment(engine: str, beside_others: bool, environ: Mapping[str, str]) -> dict[str, str]:
    """Besides `environ`, in which the user may have chosen otherwise. `beside_others`: on its cores.

    vLLM's processes manage their memory themselves.
    """
    found, told = {}, environ.get(MALLOC, "")
    if engine == "native" and "tcache" not in told:
        found[MALLOC] = f"{told}:{NO_THREAD_CACHE}".lstrip(":")
    if beside_others and not any(name in environ for name in SPIN_SETTINGS):
        found |= SPIN_BESIDE_OTHERS
    return found
