"""Every option of the server, declared once: a field here is a flag, an environment variable, a key of the TOML file,
its default and its help. Flags win over the environment, the environment over the file.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic_settings import BaseSettings, CliSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsError
from pydantic_settings import SettingsConfigDict as SettingsConfig

PREFIX = "REWARDSERVE_"


class ConfigError(Exception):
    """An option that does not exist or cannot have this value; the message names it and says what would do."""


class ServeConfig(BaseSettings):
    """Serves reward models over gRPC."""

    model_config = SettingsConfig(extra="forbid", env_prefix=PREFIX, cli_kebab_case=True, cli_implicit_flags=True)

    model: Annotated[list[str], NoDecode] = Field(
        default=[], description="checkpoint to serve: FOLDER, a hub name, or NAME=either; repeat for several"
    )
    config: str = Field(default="", description="TOML file with any of these options, named as here with _ for -")
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(default=50051, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    metrics_port: int = Field(default=9090, ge=-1, le=65535, description="Prometheus port; 0 picks one, -1 is none")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="precision of the backbone; auto is the checkpoint's own"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    max_length: int = Field(default=0, ge=0, description="longest prompt + response in tokens; 0: the checkpoint's own")
    max_batch_tokens: int = Field(
        default=0, ge=0, description="token budget of one forward; 0: 2048 on a CPU, 8192 on a GPU"
    )
    max_batch_sequences: int = Field(default=512, ge=1, description="most prompts and responses in one forward")
    prefix_cache_mb: int = Field(default=0, ge=0, description="memory for prompts' activations; 0: by what is free")
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile the layers; auto: on a GPU"
    )
    path: Literal["auto", "packed", "padded"] = Field(
        default="auto",
        description="packed refuses models that cannot be packed; padded serves all by plain Hugging Face",
    )
    threads: int = Field(default=0, ge=0, description="torch threads of one engine on a CPU; 0: all cores")
    tokenizer_threads: int = Field(default=2, ge=1, description="threads that tokenize text")

    max_pairs_per_request: int = Field(default=8192, ge=1, description="most responses in one request")
    max_queued_requests: int = Field(default=4096, ge=1, description="requests under way per model; more are refused")
    max_queued_tokens: int = Field(default=4_000_000, ge=1, description="tokens under way per model; more are refused")
    max_message_mb: int = Field(default=64, ge=1, le=2047, description="largest gRPC message")
    max_stream_requests: int = Field(default=256, ge=1, description="requests under way per ScoreStream")

    grace_s: float = Field(default=30.0, ge=0, description="seconds to finish what is in flight after SIGTERM")
    stall_timeout_s: float = Field(
        default=600.0, gt=0, description="an engine that has work but says nothing for so long is restarted"
    )
    allow_model_control: bool = Field(default=False, description="let clients load and unload models")
    log_format: Literal["text", "json"] = Field(default="text", description="form of the log lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least severe to log")
    log_requests: bool = Field(default=False, description="log every request, not only those that fail")
    log_text: bool = Field(default=False, description="log prompts and responses too")

    @pydantic.field_validator("model", mode="before")
    @classmethod
    def _split_models(cls, value: Any) -> Any:
        """An environment variable is one string; several models are separated by commas."""
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @property
    def models(self) -> dict[str, str]:
        """Name -> source. Without a name the folder's is taken."""
        named: dict[str, str] = {}
        for entry in self.model:
            name, separator, source = entry.partition("=")
            if not separator:
                name, source = Path(entry).resolve().name if Path(entry).exists() else entry.rpartition("/")[2], entry
            if name in named:
                raise ConfigError(f"model: two models are named '{name}'; name them apart with NAME=FOLDER")
            named[name] = source
        return named

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **sources: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags are handed in by `load_config`; what a file says comes in as init arguments, weakest of all."""
        return sources["env_settings"], init_settings


def load_config(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ, file: Path | None = None
) -> ServeConfig:
    """Raises ConfigError for unknown or wrong options, with the nearest spelling. `--help` exits."""
    known = list(ServeConfig.model_fields)
    _check_known(
        [name.removeprefix(PREFIX).lower() for name in environment if name.startswith(PREFIX)],
        known,
        lambda name: f"environment variable {PREFIX}{name.upper()}",
    )
    values = _read_file(file, known) if file is not None else {}
    try:
        flags = CliSettingsSource(
            ServeConfig, cli_parse_args=list(arguments), cli_prog_name="rewardserve serve", cli_exit_on_error=False
        )
        return ServeConfig(_cli_settings_source=flags, **values)  # type: ignore[call-arg]
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(_explain(detail) for detail in error.errors())) from None
    except SettingsError as error:
        raise ConfigError(_explain_flags(str(error), known)) from None


def _read_file(file: Path, known: Sequence[str]) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"config file {file}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {file}: {error}") from None
    _check_known(list(values), known, lambda name: f"key '{name}' in {file}")
    return values


def _check_known(names: Sequence[str], known: Sequence[str], describe: Any) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{describe(name)} is unknown{_nearest(name, known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _explain(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    return f"{name}: {detail['msg']} (got {detail['input']!r})"


def _explain_flags(message: str, known: Sequence[str]) -> str:
    flag = next((word for word in message.split() if word.startswith("--")), "")
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    if "unrecognized" not in message or name in known:
        return message
    near = _nearest(name, known)
    return f"flag {flag} is unknown{near}".replace("_", "-") if near else f"flag {flag} is unknown; see --help"
