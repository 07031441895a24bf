"""`rewardserve VERB ...`: one file per verb."""

import importlib
import os
import sys

VERBS = {
    "serve": "serve reward models over gRPC",
    "score": "score a JSONL file of prompts and responses, against a server or offline",
    "rank": "rank responses to one prompt, best first",
    "models": "list what a server serves; load and unload",
    "health": "exit code 0 if a server is ready to score; for container probes",
}
USAGE = "usage: rewardserve VERB [OPTIONS]\n\n" + "".join(f"  {verb:8} {text}\n" for verb, text in VERBS.items())


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE + "\nrewardserve VERB --help lists a verb's options.")
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        from rewardserve import __version__

        print(f"rewardserve {__version__}")
        return
    if arguments[0] not in VERBS:
        import difflib

        close = difflib.get_close_matches(arguments[0], VERBS, n=1)
        print(
            f"rewardserve: no verb '{arguments[0]}'" + (f"; did you mean '{close[0]}'?" if close else ""),
            file=sys.stderr,
        )
        print(USAGE, file=sys.stderr)
        raise SystemExit(2)
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # engines are new programs, not forks; spares a warning
    try:
        verb = importlib.import_module(f"rewardserve.cli.{arguments[0]}")
    except ModuleNotFoundError as error:
        print(f"rewardserve {arguments[0]} needs '{error.name}': pip install 'rewardserve[server]'", file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(verb.run(arguments[1:]))
