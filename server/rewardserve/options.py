"""Options declared once: a field of a settings class is a flag, an environment variable, a key of the TOML file, its
default and its help. Flags win over the environment, the environment over the file.

The server's variables begin with REWARDSERVE_, its keys stand at the top of the file; those of another verb begin with
REWARDSERVE_<VERB>_ and stand in the file's table [<verb>].
"""

import argparse
import difflib
import json
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, CliSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsError
from pydantic_settings import SettingsConfigDict as SettingsConfig

PREFIX = "REWARDSERVE_"
SERVE = "serve"
OTHER_VERBS = ("score", "rank", "eval", "models", "health", "bench", "train")

# Kubernetes tells every pod of a namespace where its Services are, in variables that begin with the Service's name. One
# named rewardserve, or rewardserve-metrics, must not keep the server from starting, nor be taken for its port.
KUBERNETES = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)"
)
KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://")  # the value of <SERVICE>_PORT, which can be a name of ours

NONE = "\0"  # for pydantic-settings: "null" is a text like any other
METAVARS = {"str": "TEXT", "list[str]": "TEXT", "int": "N", "float": "NUMBER", f"{{float,{NONE}}}": "NUMBER"}
DEFAULTS = {"True": " (default: on)", "False": " (default: off)", "": "", NONE: "", "[]": ""}  # others as they are

O = TypeVar("O", bound="Options")  # noqa: E741


class ConfigError(Exception):
    """An option that does not exist or cannot have this value; the message names it and says what would do."""


def _read_list(value: Any) -> Any:
    """From the environment: a JSON list, or parts between commas."""
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return [part.strip() for part in value.split(",") if part.strip()]
    try:
        return json.loads(value)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def is_of_kubernetes(variable: str, value: str) -> bool:
    name = variable.upper()
    return bool(KUBERNETES.fullmatch(name) or (name.endswith("_PORT") and KUBERNETES_PORT.match(value)))


def own_variables() -> dict[str, str]:
    """What the environment says about our options; names in capitals, for any case has effect."""
    named = {name.upper(): value for name, value in os.environ.items() if not is_of_kubernetes(name, value)}
    return {name: value for name, value in named.items() if name.startswith(PREFIX)}


Repeated = Annotated[list[str], NoDecode, BeforeValidator(_read_list)]  # a flag that may be given several times


class Options(BaseSettings):
    """Base of each verb's options."""

    model_config = SettingsConfig(extra="forbid", env_prefix=PREFIX, cli_kebab_case=True, cli_implicit_flags=True)

    config: str = Field(default="", description="TOML file with any of these options, named as here with _ for -")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **sources: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags are put in front by `load_options`; what a file says comes in as init arguments, weakest of all."""
        environment = sources["env_settings"]
        environment.env_vars = {n: v for n, v in environment.env_vars.items() if not is_of_kubernetes(n, v or "")}
        return environment, init_settings

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`port = true` would be port 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("a number is needed, not true or false")
        return value

    def require(self, holds: bool, message: str) -> None:
        """Raises ConfigError unless the options go together."""
        if not holds:
            raise ConfigError(message)


_top_keys: list[str] = []


def at_top_of_file(cls: type[O]) -> type[O]:
    """The server's options: their keys stand in no table, and are known whichever verb reads the file."""
    _top_keys.extend(cls.model_fields)
    return cls


class _Help(argparse.RawDescriptionHelpFormatter):
    """Types and defaults as a person would say them, not as Python does."""

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], *rest: Any, **more: Any) -> None:
        super().add_usage(usage, [_said_plainly(action) for action in actions], *rest, **more)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(_said_plainly(action))


def _said_plainly(action: argparse.Action) -> argparse.Action:
    if isinstance(action.metavar, str):
        action.metavar = METAVARS.get(action.metavar, action.metavar.replace("{,", "{"))
    if action.help:
        action.help = re.sub(r" \(default: (.*)\)$", lambda found: DEFAULTS.get(found[1], found[0]), action.help)
    return action


def load_options(cls: type[O], verb: str, arguments: Sequence[str], file: Path | None = None) -> O:
    """Raises ConfigError for unknown or wrong options, with the nearest spelling. `--help` exits.

    `file` stands in for `--config`.
    """
    prefix = PREFIX if verb == SERVE else f"{PREFIX}{verb.upper()}_"
    _check_variables(cls, verb, prefix)
    file = file or _config_file(arguments, prefix)
    values = _read_file(cls, verb, file) if file else {}
    repeated = [_flag(name) for name, field in cls.model_fields.items() if NoDecode in field.metadata]
    try:
        flags = CliSettingsSource(
            cls,
            cli_parse_args=_gather(arguments, repeated),
            cli_prog_name=f"rewardserve {verb}",
            cli_exit_on_error=False,
            cli_parse_none_str=NONE,
            formatter_class=_Help,
        )
        return cls(_cli_settings_source=flags, _env_prefix=prefix, **values)  # type: ignore[call-arg]
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(_explain(cls, detail, prefix) for detail in error.errors())) from None
    except SettingsError as error:
        shortcuts = (cls.model_config.get("cli_shortcuts") or {}).values()
        known = [_flag(str(name)) for name in (*cls.model_fields, *shortcuts)]
        raise ConfigError(_explain_flags(str(error), known)) from None


def _config_file(arguments: Sequence[str], prefix: str) -> Path | None:
    """Where the other options may stand; so it is looked for before them."""
    named = own_variables().get(f"{prefix}CONFIG", "")
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            named = arguments[index + 1]
        elif argument.startswith("--config="):
            named = argument.partition("=")[2]
    return Path(named) if named else None


def _check_variables(cls: type[Options], verb: str, prefix: str) -> None:
    others = tuple(f"{PREFIX}{other.upper()}_" for other in OTHER_VERBS) if verb == SERVE else ()
    for variable in own_variables():
        if not variable.startswith(prefix) or variable.startswith(others or "\0"):
            continue
        if variable.removeprefix(prefix).lower() not in cls.model_fields:
            near = _nearest(variable, [f"{prefix}{name.upper()}" for name in cls.model_fields])
            raise ConfigError(f"environment variable {variable} is unknown{near}")


def _read_file(cls: type[Options], verb: str, file: Path) -> dict[str, Any]:
    top = _parse_file(file)
    tables = {name: top.pop(name) for name in OTHER_VERBS if name in top}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"key '{name}' in {file} must be a table: [{name}], and its keys below")
    for name, value in top.items():
        _check_top_key(name, value, cls, file)
    values = top if verb == SERVE else tables.get(verb, {})
    for name in values:
        _check_key(name, cls.model_fields, file)
    return values


def _parse_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"config file {file}: {error.strerror}") from None
    except ValueError as error:  # no TOML, not UTF-8, or a number of more digits than Python reads
        raise ConfigError(f"config file {file}: {error}") from None
    except RecursionError:
        raise ConfigError(f"config file {file}: is nested too deeply") from None


def _check_top_key(name: str, value: Any, cls: type[Options], file: Path) -> None:
    if name == SERVE:
        raise ConfigError(f"key '{SERVE}' in {file} is unknown: the server's keys stand at the top, in no table")
    if isinstance(value, dict) and name not in _top_keys:
        raise ConfigError(f"table '{name}' in {file} is unknown{_nearest(name, OTHER_VERBS)}")
    if name in cls.model_fields and name not in _top_keys:
        raise ConfigError(f"key '{name}' in {file} stands at the top, where the server's do; put it into its table")
    _check_key(name, _top_keys, file)


def _check_key(name: str, known: Collection[str], file: Path) -> None:
    if name == "config":
        raise ConfigError(f"key 'config' in {file}: a file cannot name another")
    if name not in known:
        raise ConfigError(f"key '{name}' in {file} is unknown{_nearest(name, list(known))}")


def _gather(arguments: Sequence[str], repeated: Collection[str]) -> list[str]:
    """`--flag A --flag B` -> `--flag=["A", "B"]`: pydantic-settings would join by commas, and texts hold commas."""
    gathered: dict[str, list[str]] = {}
    rest = []
    upcoming = list(reversed(arguments))
    while upcoming:
        argument = upcoming.pop()
        flag, equals, value = argument.partition("=")
        if flag in repeated and not equals and upcoming and not upcoming[-1].startswith("--"):
            equals, value = "=", upcoming.pop()
        if flag in repeated and equals:
            gathered.setdefault(flag, []).append(value)
        else:
            rest.append(argument)
    return [*rest, *(f"{flag}={json.dumps(values)}" for flag, values in gathered.items())]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "; see --help"


def _explain(cls: type[Options], detail: Any, prefix: str) -> str:
    name = str(detail["loc"][0])
    what = detail["msg"]
    if detail["type"] == "string_pattern_mismatch":  # which would be told as a regular expression
        what = f"give {str(cls.model_fields[name].description).removeprefix('offline: ')}"
    return f"{_flag(name)} (or {prefix}{name.upper()}): {what} (got {detail['input']!r})"


def _explain_flags(message: str, known: Sequence[str]) -> str:
    message = message.removeprefix("error parsing CLI: ")
    if message.endswith(": expected one argument"):
        return f"{message}; one that begins with - is given as --flag=VALUE"
    if not message.startswith("unrecognized arguments: "):
        return f"{message}; see --help"
    words = message.removeprefix("unrecognized arguments: ").split()
    flag = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
    return (
        f"flag {flag} is unknown{_nearest(flag, known)}" if flag else f"one argument too many: {words[0]}; see --help"
    )
