"""Engines on CPUs are forks of one process that has imported what they need, and nothing depends on its long life."""

import asyncio
import shutil
import tempfile
from pathlib import Path

import psutil
import pytest
from rewardserve.engine.nursery_process import Nursery, is_on_cpu
from rewardserve.errors import EngineDied

SMALL = ("--max-batch-tokens", "2048")


@pytest.fixture(scope="module")
def server(start, bf16_checkpoint):
    models = [f"--model={name}={bf16_checkpoint}" for name in ("one", "two")]
    return start(*models, *SMALL).ready()


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_it_has_one_thread_so_that_no_lock_is_held_in_a_fork(server):
    assert server.nursery().num_threads() == 1
    assert sorted(engine.name() for engine in server.engines()) == ["engine[one]", "engine[two]"]


def test_engines_share_the_memory_of_what_was_imported(server):
    for engine in server.engines():
        memory = engine.memory_full_info()
        assert memory.uss < memory.rss / 2


def test_if_it_dies_all_engines_come_back_from_another(server, kit):
    first, engines = server.nursery(), server.engines()
    before = kit.scores_of(server.scoring.Score(kit.ids_request([1, 2], [[3]], model="one"), timeout=60))
    first.kill()
    kit.until(lambda: all(map(is_gone, engines)))
    kit.until(lambda: len(server.engines()) == 2 and server.is_serving())
    assert server.nursery() != first
    for name in ("one", "two"):
        reply = server.scoring.Score(kit.ids_request([1, 2], [[3]], model=name), timeout=kit.ANTI_HANG_S)
        assert kit.scores_of(reply) == before


def test_it_ends_with_a_front_that_is_killed_while_it_imports(start, bf16_checkpoint, kit, monkeypatch):
    monkeypatch.setenv("TMPDIR", folder := tempfile.mkdtemp())  # short: sockets lie in it
    server = start(f"--model=tiny={bf16_checkpoint}", *SMALL).listen()
    kit.until(server.nursery)
    nursery = server.nursery()
    assert not server.engines()
    assert list(Path(folder).glob("rewardserve-*"))
    server.process.kill()
    kit.until(lambda: is_gone(nursery))
    assert not list(Path(folder).glob("rewardserve-*"))
    shutil.rmtree(folder)


FORK = """sleep 600 > /dev/null & echo '{"begun":'$!'}'"""


def pretended(script: str) -> Nursery:
    """In bash: once it has read its first request."""
    return Nursery({}, ["bash", "-c", f"read; {script}; exec sleep 600"])


async def becomes(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_engine_that_nobody_waits_for_any_more_is_not_left_behind(tmp_path):
    asked, begun = tmp_path / "asked", tmp_path / "begun"
    nursery = pretended(f"touch {asked}; sleep 1; {FORK}; echo $! > {begun}; wait $!")
    launch = asyncio.create_task(nursery.launch(["an engine"]))
    try:
        await becomes(asked.exists)
        launch.cancel()
        await becomes(lambda: begun.exists() and begun.read_text().strip())
        await becomes(lambda: not psutil.pid_exists(int(begun.read_text())))
        assert launch.cancelled()
    finally:
        await nursery.stop()


async def test_one_that_ends_instead_of_forking_is_named_to_who_waits():
    nursery = Nursery({}, ["bash", "-c", "read; exit 7"])
    with pytest.raises(EngineDied, match="ended with code 7"):
        async with asyncio.timeout(60):
            await nursery.launch(["an engine"])
    await nursery.stop()


async def test_a_fork_that_fails_is_named_and_the_next_may_begin():
    nursery = pretended(
        f"""echo '{{"failed": "no memory"}}'; read; {FORK}; wait $!; echo '{{"ended":'$!', "code": -9}}'"""
    )
    try:
        async with asyncio.timeout(60):
            with pytest.raises(EngineDied, match="no memory"):
                await nursery.launch(["one"])
            running = await nursery.launch(["another"])
            assert running.returncode is None
            running.kill()
            assert await running.wait() == running.returncode == -9
            with pytest.raises(ProcessLookupError):
                running.kill()
    finally:
        await nursery.stop()


async def test_what_is_said_of_other_processes_is_passed_over_and_nonsense_ends_it(caplog):
    nursery = pretended(f"""{FORK}; echo '{{"ended": 1, "code": 0}}'; sleep 0.5; echo nonsense""")
    async with asyncio.timeout(60):
        running = await nursery.launch(["an engine"])
        assert await running.wait() == -9
    assert "cannot be understood" in caplog.text
    await nursery.stop()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_an_engine_on_a_gpu_is_no_fork(device):
    assert not is_on_cpu(device)
