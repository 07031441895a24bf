"""`rewardserve serve --engine vllm`, real, on a CPU. Needs an environment with vLLM: `make test-vllm` makes one."""

import importlib.util
import os
from pathlib import Path

import pytest
import real_server
from real_server import bf16_checkpoint, checkpoint, kit, real_groups, start

__all__ = ["bf16_checkpoint", "checkpoint", "kit", "real_groups", "start"]
IS_INSTALLED = importlib.util.find_spec("vllm") is not None
if IS_INSTALLED:
    os.environ.pop("OMP_NUM_THREADS", None)  # how many, it plans by itself
    real_server.ANTI_HANG_S = 400  # vLLM is imported by three processes, one after the other, at each start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.timeout(900))
            if not IS_INSTALLED:
                reason = "vLLM is not installed here; `make test-vllm` runs these in an environment that has it"
                item.add_marker(pytest.mark.skip(reason=reason))
