"""`rewardserve VERB ...`: one file per verb."""

import importlib
import os
import signal
import sys

VERBS = {
    "serve": "serve reward models over gRPC",
    "score": "score a JSONL file of prompts and responses, against a server or offline",
    "rank": "rank responses to one prompt, best first",
    "eval": "judge a reward model by pairs or rated responses: accuracy, calibration, bias, best-of-N",
    "models": "list what a server serves; load, swap, update, unload",
    "bench": "measure a server: latency against load, as a picture",
    "train": "train a reward model, or an ensemble, on pairs or ratings",
    "health": "exit code 0 if a server is ready to score; for container probes",
}
EXTRAS = {"train": "train", "eval": "eval", "serve": "server"}  # of verbs that need one whatever they are to do
OF_CLI = {"pydantic", "pydantic_settings", "rich", "tqdm"}  # what the others need for a server elsewhere
USAGE = "usage: rewardserve VERB [OPTIONS]\n\n" + "".join(f"  {verb:8} {text}\n" for verb, text in VERBS.items())


def main() -> None:
    _heed_sigterm()
    _stand_in_for_closed_streams()
    code: int | str | None
    try:
        try:
            code = _run(sys.argv[1:])
        except SystemExit as exit_:  # of --help
            code = exit_.code
        sys.stdout.flush()
    except OSError as error:  # nobody reads it, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"rewardserve: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("rewardserve: interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)


def _heed_sigterm() -> None:
    """Of a container's first process the system does not end what has set nothing up: it would be killed in the end.

    The server drains, once it has anything to drain.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))


def _stand_in_for_closed_streams() -> None:
    """Or the next file or socket would get the number of stdout, and what is printed with it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE + "\nrewardserve VERB --help lists a verb's options.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from rewardserve import __version__

        print(f"rewardserve {__version__}")
        return 0
    if arguments[0] not in VERBS:
        import difflib

        close = difflib.get_close_matches(arguments[0], VERBS, n=1)
        print(
            f"rewardserve: no verb '{arguments[0]}'" + (f"; did you mean '{close[0]}'?" if close else ""),
            file=sys.stderr,
        )
        print(USAGE, file=sys.stderr)
        return 2
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # engines are new programs, not forks; spares a warning
    try:
        verb = importlib.import_module(f"rewardserve.cli.{arguments[0]}")
    except ModuleNotFoundError as error:
        print(f"rewardserve {arguments[0]} {advice(arguments[0], error)}", file=sys.stderr)
        return 1
    return verb.run(arguments[1:])


def advice(verb: str, error: ModuleNotFoundError) -> str:
    """What to install."""
    extra = EXTRAS.get(verb, "cli" if error.name in OF_CLI else "server")
    return f"needs '{error.name}': pip install 'rewardserve[{extra}]'"
