"""How an engine's process comes to be: as a program of its own, or as a fork (engine/nursery_process.py)."""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

CHILD_PROGRAM = (sys.executable, "-m", "rewardserve.engine.child")


class Running(Protocol):
    """As much of asyncio's Process as an engine's needs."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None:
        """None while it runs; -N if signal N ended it."""

    async def wait(self) -> int: ...

    def kill(self) -> None:
        """Raises ProcessLookupError if it is gone."""


class Launcher(Protocol):
    async def launch(self, arguments: Sequence[str]) -> Running:
        """A process of engine/child.py with these, the leader of a session of its own. Raises EngineDied, OSError.

        Of its own, so that processes it starts can be found when it is dead, and a terminal's Ctrl-C ends none.
        """


class Program:
    """Begins at the beginning, which takes an engine seconds: it imports torch and transformers."""

    def __init__(self, environment: Mapping[str, str], program: Sequence[str] = CHILD_PROGRAM) -> None:
        """`environment` is what it has besides this process's."""
        self._environment = dict(environment)
        self._program = tuple(program)

    async def launch(self, arguments: Sequence[str]) -> Running:
        return await asyncio.create_subprocess_exec(
            *self._program,
            *arguments,
            str(os.getpid()),
            start_new_session=True,
            env={**os.environ, **self._environment},
        )
