"""Few threads and fixed seeds, so that a test says the same on every machine."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread each, where a test asks for no more: several tests run at a time, and threads that wait for one another on
# cores that others use wait long. That scores do not depend on their number is for tests that say so.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of tests and servers on the same cores: threads that spin take what the others wait for (engine/environment.py).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The tests start some hundred processes, and each would compile anew what it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# By default hypothesis fails what takes 200 ms, which anything does on busy cores, and tries others at every run.
settings.register_profile(
    "the same everywhere", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("the same everywhere")

HERE = Path(__file__).parent
LONGEST = ("e2e", "test_demo_model.py", "test_packaging.py", "training", "benchmarks", "parity", "cli")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first, whatever their number: with several workers none is left alone with one at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(HERE).parts[0], len(LONGEST)))
