"""Log lines as people read them or as machines do; the same for the front and its engines."""

import json
import logging
import time


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
        return json.dumps(entry, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        return super().format(record) + fields


def set_up_logging(form: str, level: str, process: str = "") -> None:
    """`form` is text or json; `process` names an engine's lines. Fields go in as `extra={"fields": {...}}`."""
    handler = logging.StreamHandler()
    prefix = f"{process} " if process else ""
    handler.setFormatter(_JsonFormatter(process or "front") if form == "json" else _TextFormatter(prefix))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
