"""What vLLM's processes are told by their environment, and what they say of themselves on stderr."""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from importlib.metadata import entry_points

from rewardserve.engine.cgroups import num_cores
from rewardserve.engine.vllm_options import VllmOptions
from rewardserve.engine.vllm_plugin import OWNER
from rewardserve.errors import LoadFailed
from rewardserve.logs import as_log_line

log = logging.getLogger(__name__)

# The exception in a line of a traceback or a log: its kind, and what it says.
EXCEPTION = re.compile(r"^(?:\([^)]*\) )?(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.+)")


def set_environment(options: VllmOptions) -> None:
    """vLLM and the processes it starts read these when they are imported."""
    os.environ[OWNER] = str(os.getpid())
    if not any(plugin.name == "rewardserve" for plugin in entry_points(group="vllm.general_plugins")):
        log.warning("rewardserve is not installed but on the path: a score that is not a number may spread to others")
    if "VLLM_PLUGINS" in os.environ:  # those that it names are all that are called
        os.environ["VLLM_PLUGINS"] += ",rewardserve"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # its log lines are ours, then
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process has threads, which a fork would cut off
    os.environ["HF_HUB_OFFLINE"] = "1"  # all there is to load lies in a local folder by now
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and it would win over kv_cache_memory_bytes
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _binding(options)
    if options.device.startswith("cuda:"):
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible_gpu(int(options.device.removeprefix("cuda:")))


def _visible_gpu(number: int) -> str:
    """cuda:1 is the second of those that are visible, whatever they are called."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else []
    if visible and number >= len(names):
        raise LoadFailed(f"device = cuda:{number}, but CUDA_VISIBLE_DEVICES={visible} leaves {len(names)}")
    return names[number] if visible else str(number)


def _binding(options: VllmOptions) -> str:
    """Cores for each rank, where the engine has them all; some of them are not bound, or two engines would share."""
    cores = sorted(os.sched_getaffinity(0))
    ranks, num_threads = options.tensor_parallel, options.num_threads or num_cores()
    if num_threads != len(cores) or len(cores) < ranks:
        os.environ["OMP_NUM_THREADS"] = str(max(1, num_threads // ranks))
        return "nobind"
    size = len(cores) // ranks
    return "|".join(",".join(map(str, cores[rank * size : (rank + 1) * size])) for rank in range(ranks))


@contextlib.contextmanager
def overheard() -> Iterator[list[str]]:
    """The exceptions that the processes vLLM starts say on stderr, in the order they come: they are said there only.

    All is passed on as it comes, also after the block, for as long as they live.
    """
    reasons: list[str] = []
    loading = threading.Event()
    loading.set()
    reader, writer = os.pipe()
    stderr = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)

    def pass_on() -> None:
        with os.fdopen(reader, "rb") as lines:
            for line in lines:
                said = line.decode(errors="replace").rstrip()
                os.write(stderr, f"{as_log_line(said)}\n".encode())
                if loading.is_set() and (match := EXCEPTION.match(said)):
                    reasons.append(f"{match[1]}: {match[2][:500]}")

    threading.Thread(target=pass_on, name="stderr of vLLM", daemon=True).start()
    try:
        yield reasons
    finally:
        loading.clear()
        os.dup2(stderr, 2)
