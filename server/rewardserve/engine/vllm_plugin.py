"""What vLLM's own processes are told of us: vLLM calls `register` in each (entry point vllm.general_plugins).

A block of its cache that is given to new work holds what was there before. Attention masks that, but zero times NaN is
NaN: after one input whose activations overflow, others that get its blocks had no score either. vLLM can zero blocks
as they are given out, and does so for some models only; here it is to do so for all.

And its planning process does not notice when it is left alone: it would hold the device for nobody.
"""

import os
import signal
import threading
import time

OWNER = "REWARDSERVE_VLLM_OWNER"  # the engine's process; other users of the same environment keep what they had
CHECK_INTERVAL_S, END_S = 1.0, 5.0


def register() -> None:
    owner = int(os.environ.get(OWNER, "0"))
    if not owner:
        return
    from vllm.v1.kv_cache_interface import KVCacheConfig

    KVCacheConfig.needs_kv_cache_zeroing = property(lambda config: True)
    if os.getpid() != owner:
        threading.Thread(target=_end_with, args=(owner, os.getppid()), daemon=True).start()


def _end_with(owner: int, parent: int) -> None:
    """The parent of a worker is the planning process; that of a process that came too late to have one is 1."""
    while parent != 1 and os.getppid() == parent and _exists(owner):
        time.sleep(CHECK_INTERVAL_S)
    os.kill(os.getpid(), signal.SIGTERM)  # to remove what it shares
    time.sleep(END_S)
    os._exit(1)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
