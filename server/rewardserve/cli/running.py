"""What goes wrong in a verb, as one line on stderr and an exit code."""

import errno
import os
import sys
from collections.abc import Callable, Sequence

from rewardserve.cli.main import advice
from rewardserve.client import (
    AsyncRewardClient,
    DeadlineExceeded,
    ModelNotFound,
    Overloaded,
    RewardClientError,
    Unavailable,
)
from rewardserve.config import ServeConfig
from rewardserve.errors import RewardServeError
from rewardserve.logs import escape
from rewardserve.options import ConfigError

DEFAULT_ENDPOINT = f"127.0.0.1:{ServeConfig.model_fields['port'].default}"
MAX_TIMEOUT_S = 1e9  # much more, and gRPC takes it for a moment that has passed


def guarded(verb: str, work: Callable[[], int]) -> int:
    """Runs `work`. What goes wrong becomes one line on stderr and an exit code: 1 while running, 2 for wrong usage."""
    try:
        code = work()
        sys.stdout.flush()  # or the interpreter does at its exit, when nobody can say what went wrong
        return code
    except ConfigError as error:
        code, message = 2, str(error)
    except RewardClientError as error:
        code, message = 1, f"{error}{_advice(verb, error)}"
    except UnicodeEncodeError as error:  # bytes of the command line that are no text; protobuf does not take them
        code, message = 2, f"{error.object!r} is not UTF-8"
    except ModuleNotFoundError as error:
        code, message = 1, advice(verb, error)
    except (RewardServeError, OSError) as error:
        if isinstance(error, OSError):
            _settle_stdout()
        if getattr(error, "errno", None) == errno.EPIPE:
            return 1
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    complain(verb, message)
    return code


def complain(verb: str, message: str) -> None:
    """One line, whatever a server or a file has put into it."""
    print(f"rewardserve {verb}: {escape(' '.join(message.split()))}", file=sys.stderr)


def _settle_stdout() -> None:
    """What cannot be written is dropped: the interpreter flushes once more at its exit, and would complain of it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _advice(verb: str, error: RewardClientError) -> str:
    match error:
        case Unavailable() if error.is_reply:
            return "; `rewardserve models` says how it is doing"
        case Unavailable():
            return (
                "; is a server there? `rewardserve serve --model FOLDER` starts one, --endpoint HOST:PORT names another"
            )
        case ModelNotFound() if verb != "models":
            return "; choose with --name"
        case DeadlineExceeded() if verb == "models":
            return "; --timeout waits longer; a change that has begun goes on, see `rewardserve models`"
        case DeadlineExceeded():
            return "; give it longer with --timeout"
        case Overloaded():
            return "; lower --window, or come back later" if error.retry_after_s else "; is one row that large?"
        case _:
            return ""


def connect(endpoints: Sequence[str], timeout_s: float) -> AsyncRewardClient:
    """Raises ConfigError for what is no endpoint."""
    for endpoint in endpoints:
        check_port(endpoint)
    try:
        return AsyncRewardClient(endpoints or DEFAULT_ENDPOINT, timeout=timeout_s)
    except ValueError as error:
        raise ConfigError(f"--endpoint: {error}") from None


def check_port(endpoint: str) -> None:
    """gRPC would try 443, where no server of ours is."""
    if endpoint and not set(":/") & set(endpoint):
        raise ConfigError(f"--endpoint: {endpoint!r} has no port; give HOST:PORT")
