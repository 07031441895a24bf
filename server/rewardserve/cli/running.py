"""What goes wrong in a verb, as one line on stderr and an exit code."""

import os
import sys
from collections.abc import Callable, Sequence

from rewardserve.client import (
    AsyncRewardClient,
    DeadlineExceeded,
    ModelNotFound,
    Overloaded,
    RewardClientError,
    Unavailable,
)
from rewardserve.errors import RewardServeError
from rewardserve.options import ConfigError

DEFAULT_ENDPOINT = "127.0.0.1:50051"


def guarded(verb: str, work: Callable[[], int]) -> int:
    """Runs `work`. What goes wrong becomes one line on stderr and an exit code: 1 while running, 2 for wrong usage."""
    try:
        return work()
    except ConfigError as error:
        code, message = 2, str(error)
    except RewardClientError as error:
        code, message = 1, f"{error}{_advice(verb, error)}"
    except ModuleNotFoundError as error:
        code, message = 1, f"needs '{error.name}': pip install 'rewardserve[server]'"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its exit
        return 1
    except (RewardServeError, OSError) as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    print(f"rewardserve {verb}: {' '.join(message.split())}", file=sys.stderr)
    return code


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _advice(verb: str, error: RewardClientError) -> str:
    match error:
        case Unavailable():
            return (
                "; is a server there? `rewardserve serve --model FOLDER` starts one, --endpoint HOST:PORT names another"
            )
        case ModelNotFound() if verb != "models":
            return "; choose with --name"
        case DeadlineExceeded():
            return "; give it longer with --timeout"
        case Overloaded():
            return "; lower --window, or come back later" if error.retry_after_s else "; is one row that large?"
        case _:
            return ""


def connect(endpoints: Sequence[str], timeout_s: float) -> AsyncRewardClient:
    """Raises ConfigError for what is no endpoint."""
    try:
        return AsyncRewardClient(endpoints or DEFAULT_ENDPOINT, timeout=timeout_s)
    except ValueError as error:
        raise ConfigError(f"--endpoint: {error}") from None
