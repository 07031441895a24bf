"""`rewardserve serve`: a server until SIGTERM or SIGHUP, which drain it; a second SIGTERM ends it at once."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from rewardserve.app import TEXT_THREADS, App
from rewardserve.cli.running import complain
from rewardserve.config import ServeConfig, load_config
from rewardserve.errors import LoadFailed
from rewardserve.logs import set_up_logging
from rewardserve.options import ConfigError

log = logging.getLogger(__name__)

MAX_FILES = 1 << 20
READERS_END_S = 1.0
LEAST_FILES = 64  # some forty are open before the first connection


def run(arguments: Sequence[str]) -> int:
    try:
        config = load_config(arguments)
        config.check()
    except ConfigError as error:
        complain("serve", str(error))
        return 2
    set_up_logging(config.log_format, config.log_level)
    if (num_files := allow_many_files()) < LEAST_FILES:
        log.critical("no more than %d files may be open here; raise that, as by `ulimit -n 1024`", num_files)
        return 1
    code = _with_fastest_loop(_serve(config))
    _leave_behind_who_reads_text(code)
    return code


def allow_many_files() -> int:
    """A file to each connection. At first a process has 1,024, for the sake of programs that call select(); more are
    had for the asking, as a service or a shell has set it. Returns how many there are now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # above what the system allows
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_FILES if now == resource.RLIM_INFINITY else now


def _leave_behind_who_reads_text(code: int) -> None:
    """The interpreter would wait for their threads: as long as a long text takes, or for ever if a template loops."""
    ends_at = time.monotonic() + READERS_END_S
    while any(thread.name.startswith(TEXT_THREADS) for thread in threading.enumerate()):
        if time.monotonic() > ends_at:
            sys.stderr.flush()
            os._exit(code)
        time.sleep(0.01)


def _with_fastest_loop(main: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.run(main)
    return uvloop.run(main)


async def _serve(config: ServeConfig) -> int:
    try:
        app = App(config)
    except LoadFailed as error:  # a calibration or a reference that cannot be read
        log.critical("%s", error)
        return 1
    stopping, asked = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stopping, asked)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup does
        loop.add_signal_handler(signal.SIGHUP, stopping.set)  # a terminal that is closed may send it twice
    starting = asyncio.create_task(app.start())
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((starting, stop), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            log.info("ready")
            await stop
        else:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        await app.drain()  # what is loaded serves, while the others are loading
    except (LoadFailed, OSError) as error:
        log.critical("%s", error)
        return 1
    finally:
        stop.cancel()
        await app.stop()
    log.info("stopped")
    return 0


def _on_signal(stopping: asyncio.Event, asked: asyncio.Event) -> None:
    """Not counting SIGHUP: who ends a session sends that, and SIGTERM right behind it, and means one end."""
    if asked.is_set():
        os._exit(130)  # asked twice: at once; engines notice that their parent is gone
    asked.set()
    stopping.set()
