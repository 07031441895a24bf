"""Options declared once: a field of a settings class is a flag, an environment variable, a key of the TOML file, its
default and its help. Flags win over the environment, the environment over the file.

The server's variables begin with REWARDSERVE_, its keys stand at the top of the file; those of another verb begin with
REWARDSERVE_<VERB>_ and stand in the file's table [<verb>].
"""

import difflib
import json
import os
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, CliSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsError
from pydantic_settings import SettingsConfigDict as SettingsConfig

PREFIX = "REWARDSERVE_"
SERVE = "serve"
OTHER_VERBS = ("score", "rank", "models", "health")

O = TypeVar("O", bound="Options")  # noqa: E741


class ConfigError(Exception):
    """An option that does not exist or cannot have this value; the message names it and says what would do."""


def _read_list(value: Any) -> Any:
    """From the environment: a JSON list, or parts between commas."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.startswith("[") else [part.strip() for part in value.split(",") if part.strip()]


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
        return sources["env_settings"], init_settings

    def require(self, holds: bool, message: str) -> None:
        """Raises ConfigError unless the options go together."""
        if not holds:
            raise ConfigError(message)


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
            cli_parse_none_str="\0",  # "null" is a text like any other
        )
        return cls(_cli_settings_source=flags, _env_prefix=prefix, **values)  # type: ignore[call-arg]
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(_explain(detail, prefix) for detail in error.errors())) from None
    except SettingsError as error:
        shortcuts = (cls.model_config.get("cli_shortcuts") or {}).values()
        known = [_flag(str(name)) for name in (*cls.model_fields, *shortcuts)]
        raise ConfigError(_explain_flags(str(error), known)) from None


def _config_file(arguments: Sequence[str], prefix: str) -> Path | None:
    """Where the other options may stand; so it is looked for before them."""
    named = os.environ.get(f"{prefix}CONFIG", "")
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            named = arguments[index + 1]
        elif argument.startswith("--config="):
            named = argument.partition("=")[2]
    return Path(named) if named else None


def _check_variables(cls: type[Options], verb: str, prefix: str) -> None:
    others = tuple(f"{PREFIX}{other.upper()}_" for other in OTHER_VERBS) if verb == SERVE else ()
    for variable in map(str.upper, os.environ):  # any case has effect
        if not variable.startswith(prefix) or variable.startswith(others or "\0"):
            continue
        if variable.removeprefix(prefix).lower() not in cls.model_fields:
            near = _nearest(variable, [f"{prefix}{name.upper()}" for name in cls.model_fields])
            raise ConfigError(f"environment variable {variable} is unknown{near}")


def _read_file(cls: type[Options], verb: str, file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"config file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file}: {error}") from None
    if verb == SERVE:
        values = {name: value for name, value in values.items() if name not in OTHER_VERBS}
    else:
        values = values.get(verb, {})
    for name in values:
        if name == "config":
            raise ConfigError(f"key 'config' in {file}: a file cannot name another")
        if name not in cls.model_fields:
            raise ConfigError(f"key '{name}' in {file} is unknown{_nearest(name, list(cls.model_fields))}")
    return values


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


def _explain(detail: Any, prefix: str) -> str:
    name = str(detail["loc"][0])
    return f"{_flag(name)} (or {prefix}{name.upper()}): {detail['msg']} (got {detail['input']!r})"


def _explain_flags(message: str, known: Sequence[str]) -> str:
    message = message.removeprefix("error parsing CLI: ")
    if not message.startswith("unrecognized arguments: "):
        return f"{message}; see --help"
    words = message.removeprefix("unrecognized arguments: ").split()
    flag = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
    return (
        f"flag {flag} is unknown{_nearest(flag, known)}" if flag else f"one argument too many: {words[0]}; see --help"
    )
