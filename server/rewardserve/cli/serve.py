"""`rewardserve serve`: a server until SIGTERM, which drains it, or a second signal, which ends it at once."""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rewardserve.app import App
from rewardserve.config import PREFIX, ConfigError, ServeConfig, load_config
from rewardserve.errors import LoadFailed

log = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> int:
    try:
        arguments, file = _take_config_flag(list(arguments))
        config = load_config(arguments, file=file)
        if not config.models and not config.allow_model_control:
            raise ConfigError("no model: give --model FOLDER (or --allow-model-control to load one later)")
    except ConfigError as error:
        print(f"rewardserve serve: {error}", file=sys.stderr)
        return 2
    _set_up_logging(config)
    return _with_fastest_loop(_serve(config))


def _take_config_flag(arguments: list[str]) -> tuple[list[str], Path | None]:
    """`--config FILE` says where the other options may stand, so it is no option among them."""
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[:index] + arguments[index + 2 :], Path(arguments[index + 1])
        if argument.startswith("--config="):
            return arguments[:index] + arguments[index + 1 :], Path(argument.partition("=")[2])
    named = os.environ.get(f"{PREFIX}CONFIG")
    return arguments, Path(named) if named else None


def _with_fastest_loop(main: "asyncio._CoroutineLike[int]") -> int:
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.run(main)
    return uvloop.run(main)


async def _serve(config: ServeConfig) -> int:
    app = App(config)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stopping)
    starting = asyncio.create_task(app.start())
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((starting, stop), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            log.info("ready")
            await stop
            await app.drain()
        else:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
    except (LoadFailed, OSError) as error:
        log.critical("%s", error)
        return 1
    finally:
        stop.cancel()
        await app.stop()
    log.info("stopped")
    return 0


def _on_signal(stopping: asyncio.Event) -> None:
    if stopping.is_set():
        os._exit(130)  # asked twice: at once; engines notice that their parent is gone
    stopping.set()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _set_up_logging(config: ServeConfig) -> None:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_JsonFormatter() if config.log_format == "json" else text)
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])
