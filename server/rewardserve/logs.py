"""Log lines as people read them or as machines do; the same for the front and its engines."""

import json
import logging
import re
import time
from typing import Any

# A name that a caller chose must not forge a line, steer the terminal it is read on, or turn its letters around.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def escape(text: str) -> str:
    return UNSAFE.sub(lambda found: SHORT.get(found[0], f"\\u{ord(found[0]):04x}"), text)


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return escape(json.dumps(entry, ensure_ascii=False, default=str))  # which leaves a few that terminals obey


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_shown(value)}" for name, value in getattr(record, "fields", {}).items())
        return escape(super().formatMessage(record)) + fields

    def formatException(self, ei: Any) -> str:
        """Indented, for a line of it must not look like one of the log."""
        return "\n".join(f"    {escape(line)}" for line in super().formatException(ei).split("\n"))


def _shown(value: Any) -> str:
    """In quotes where it would not be seen where it ends and the next field begins."""
    text = str(value)
    return escape(json.dumps(text, ensure_ascii=False) if re.search(r'[\s="]', text) or not text else text)


def as_log_line(said: str) -> str:
    """What a process that is not ours said on stderr: where the log is in JSON, who reads it expects nothing else."""
    handlers = logging.getLogger().handlers
    formatter = handlers[0].formatter if handlers else None
    if not isinstance(formatter, _JsonFormatter) or said.startswith('{"time": "'):  # or it is one of ours
        return said
    return formatter.format(logging.LogRecord("stderr", logging.WARNING, "", 0, said, None, None))


def set_up_logging(form: str, level: str, process: str = "") -> None:
    """`form` is text or json; `process` names an engine's lines. Fields go in as `extra={"fields": {...}}`."""
    handler = logging.StreamHandler()
    prefix = f"{process} " if process else ""
    handler.setFormatter(_JsonFormatter(process or "front") if form == "json" else _TextFormatter(prefix))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(form == "json")  # of libraries; people read them as Python writes them
