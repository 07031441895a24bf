"""One record is one line, whatever a caller has put into it."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rewardserve.logs import as_log_line, set_up_logging

FORGED = "r1\n2026-01-01 00:00:00,000 CRITICAL fake line"
UNSAFE = [
    "\n",
    "\r",
    "\t",
    "\0",
    "\x1b[31m",
    "\x7f",
    "\x85",
    "\x9b31m",
    "\u2028",
    "\u2029",
    "\u202e",
    "\u2066",
    "\ud800",
]

Written = Callable[[], str]


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Logs a message in a form, and gives back what was written."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def write(form: str, message: str, *arguments: Any, **extra: Any) -> str:
        set_up_logging(form, "info", "engine[rm]")
        capfd.readouterr()
        logging.getLogger("test").info(message, *arguments, **extra)
        return capfd.readouterr().err

    yield write
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def fields(**named: Any) -> dict[str, Any]:
    return {"extra": {"fields": named}}


def is_one_plain_line(text: str) -> bool:
    return (
        text.endswith("\n")
        and len(text[:-1].splitlines()) == 1
        and not any(unsafe[0] in text[:-1] for unsafe in UNSAFE)
    )


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("unsafe", UNSAFE, ids=ascii)
def test_a_record_is_one_line_without_control_characters(form: str, unsafe: str, log) -> None:
    assert is_one_plain_line(log(form, "no model %s", f"a{unsafe}b"))
    assert is_one_plain_line(log(form, "request", **fields(request_id=f"a{unsafe}b", error=f"{unsafe}")))


def test_a_request_cannot_forge_a_line(log) -> None:
    text = log("text", "request", **fields(request_id=FORGED, model="\x1b]0;x\x07"))
    assert text.count("\n") == 1
    assert r'request_id="r1\n2026-01-01 00:00:00,000 CRITICAL fake line"' in text and r"\u001b]0;x\u0007" in text


def test_a_request_cannot_forge_a_field(log) -> None:
    text = log("text", "request", **fields(request_id="x status=OK", model='a" status="OK', status="INTERNAL"))
    assert r'request request_id="x status=OK" model="a\" status=\"OK" status=INTERNAL' in text


def test_plain_fields_stand_as_they_are(log) -> None:
    text = log("text", "request", **fields(request_id="r-1", model="", seconds=0.5, text="日本語　é"))
    assert text.endswith(' INFO engine[rm] request request_id=r-1 model="" seconds=0.5 text="日本語　é"\n')


def test_json_gives_back_what_was_logged(log) -> None:
    for value in (*UNSAFE[:-1], FORGED, "日本語 é \U0001f600", '"\\'):
        entry = json.loads(log("json", "said %s", value, **fields(request_id=value)))
        assert (entry["message"], entry["request_id"]) == (f"said {value}", value)
        assert (entry["level"], entry["process"]) == ("info", "engine[rm]")


def test_json_takes_any_field(log) -> None:
    assert json.loads(log("json", "x", **fields(error=ValueError("y"))))["error"] == "y"


def test_what_other_processes_say_is_json_where_the_log_is(log) -> None:
    line = log("json", "of ours").rstrip()
    assert as_log_line(line) == line
    assert json.loads(as_log_line("{Loading: 50%|\r"))["message"] == "{Loading: 50%|\r"
    log("text", "of ours")
    assert as_log_line("Loading: 50%") == "Loading: 50%"


def test_a_librarys_warning_is_json_where_the_log_is(log, capfd) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        log("json", "of ours")
        warnings.warn("this is\ndeprecated", FutureWarning, stacklevel=1)
    entry = json.loads(capfd.readouterr().err)
    assert entry["level"] == "warning" and "FutureWarning: this is\ndeprecated" in entry["message"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_cannot_forge_a_line(form: str, log) -> None:
    text = log(form, "failed", exc_info=ValueError(f"{FORGED}\x1b[31m"))
    assert "\x1b" not in text and "ValueError" in text and "CRITICAL fake line" in text
    assert all(line.startswith("    ") for line in text.splitlines()[1:])
