"""Every option of the server."""

import contextlib
import math
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rewardserve.options import SERVE, ConfigError, Options, Repeated, at_top_of_file, load_options
from rewardserve.types import Aggregate, is_model_name

DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
DEVICES = r"^(auto|(cpu|cuda(:\d+)?)(,(cpu|cuda(:\d+)?))*)$"
# Of the native engine, and heeded only if vLLM is not asked for.
NATIVE_SWITCHES = {
    "--batch-invariant": "batch_invariant",
    "--cuda-graphs": "cuda_graphs",
    "--own-kernels": "own_kernels",
    "--share-backbone": "share_backbone",
    "--host-cache-mb": "host_cache_mb",
}
MAX_THREADS = 4096  # more is a slip of the finger, and ends in a crash of torch


@at_top_of_file
class ServeConfig(Options):
    """Serves reward models over gRPC."""

    model: Repeated = Field(
        default=[], description="checkpoint to serve: FOLDER, a hub name, or NAME=either; repeat for several"
    )
    ensemble: Repeated = Field(
        default=[],
        description="NAME=HOW(a+b+c): models as one; HOW is mean, min, median or mean-0.5std; repeat for several",
    )
    calibration: Repeated = Field(
        default=[], description="NAME=FILE: what rewardserve eval fitted to it; NAME=none: nor one beside it; repeat"
    )
    length_penalty: Repeated = Field(
        default=[], description="NAME=NUMBER: taken off that model's scores for each token of a response"
    )
    attribute_weights: Repeated = Field(
        default=[], description="NAME=helpful:0.7+safe:0.3: attributes that make that model's score; repeat"
    )
    drift_reference: Repeated = Field(
        default=[],
        description="NAME=FILE: its scores when all was well, by rewardserve score; metrics tell the drift; repeat",
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for all")
    port: int = Field(default=50051, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    metrics_port: int = Field(default=9090, ge=-1, le=65535, description="Prometheus port; 0 picks one, -1 is none")

    engine: Literal["auto", "native", "vllm"] = Field(
        default="auto",
        description="auto: native or, for a checkpoint it cannot load, vllm if that is installed",
    )
    tensor_parallel: int = Field(
        default=1, ge=1, le=1024, description="GPUs one model is spread over; from 2 on it is served by vllm"
    )
    vllm_quantization: str = Field(
        default="",
        description="vllm's method for weights, such as fp8; a checkpoint that is quantized already needs no naming",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="precision of the backbone; auto is the checkpoint's own"
    )
    device: str = Field(
        default="auto",
        pattern=DEVICES,
        description="auto, cpu, cuda or cuda:N; several, as in cuda:0,cuda:1: one engine on each",
    )
    max_length: int = Field(default=0, ge=0, description="longest prompt + response in tokens; 0: the checkpoint's own")
    max_batch_tokens: int = Field(
        default=0, ge=0, description="token budget of one forward; 0: 4096 on a CPU, 8192 on a GPU"
    )
    max_batch_sequences: int = Field(default=512, ge=1, description="most prompts and responses in one forward")
    prefix_cache_mb: int = Field(default=0, ge=0, description="memory for prompts' activations; 0: by what is free")
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="torch.compile the layers; auto: where a probe says it pays; off: nor build kernels for this CPU",
    )
    host_cache_mb: int = Field(
        default=0,
        ge=0,
        description="host memory for prompts that leave the prefix cache; meant for a GPU and 4B parameters or more",
    )
    batch_invariant: bool = Field(
        default=True,
        description="on a GPU, native engine: a pair's score is to be the same bits whatever is computed beside it",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="native engine: replay forwards of up to 2048 tokens as CUDA graphs, for models up to 5B",
    )
    own_kernels: bool = Field(
        default=True,
        description="native engine: off: torch's operations in place of our kernels; slow, to see if a kernel is wrong",
    )
    share_backbone: bool = Field(
        default=True,
        description="native engine: models that are adapters of one base are loaded once, over one backbone",
    )
    quantize: Literal["", "int8", "fp8"] = Field(
        default="",
        description="native engine: 8-bit weights and activations, less exact: int8 on a CPU, fp8 on a GPU (8.9 on)",
    )
    path: Literal["auto", "packed", "padded"] = Field(
        default="auto",
        description="native engine: packed refuses what cannot be packed; padded serves all by plain Hugging Face",
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=MAX_THREADS,
        description="torch threads of an engine on a CPU; 0: all cores (of a quota), shared by devices and an ensemble",
    )
    tokenizer_threads: int = Field(default=2, ge=1, le=MAX_THREADS, description="threads that tokenize text")

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
    log_text: bool = Field(
        default=False, description="log prompts and responses too, of every request unless --no-log-requests"
    )

    @model_validator(mode="after")
    def _text_needs_requests(self) -> "ServeConfig":
        if self.log_text and "log_requests" not in self.model_fields_set:
            self.log_requests = True
        return self

    def check(self) -> None:
        """Raises ConfigError for options that do not go together."""
        self.require(
            bool(self.models) or self.allow_model_control,
            "no model: give --model FOLDER (or --allow-model-control to load one later)",
        )
        self.require(
            self.port != self.metrics_port or self.port == 0,
            f"--port and --metrics-port are both {self.port}; choose another for one of them",
        )
        self.require(
            self.path != "padded" or self.compile != "on", "--compile on needs the packed path, not --path padded"
        )
        self.require(self.path != "padded" or not self.quantize, "--quantize needs the packed path, not --path padded")
        self.require(
            self.path != "padded" or not self.host_cache_mb, "--host-cache-mb is of the packed path, not --path padded"
        )
        self.require(
            self.own_kernels or not self.quantize, "--quantize is done by kernels, which --no-own-kernels leaves out"
        )
        self._check_engine()
        _ = (self.ensembles, self.length_penalties, self.drift_references)
        calibrated = self.calibrations
        for name in self.ensembles:
            if name in calibrated and calibrated[name] is None:
                raise ConfigError(f"--calibration '{name}=none': nothing lies beside an ensemble; leave it out")
        for name in {name for name, file in calibrated.items() if file} & set(self.weights_of_attributes):
            raise ConfigError(
                f"--calibration '{name}' was fitted to the model's own score, and --attribute-weights makes another; "
                "leave one of them out"
            )
        self.require(
            not self.log_requests or self.log_level in ("debug", "info"),
            f"requests are logged at level info, which --log-level {self.log_level} leaves out",
        )

    @property
    def means_native(self) -> bool:
        """Whether something is asked for that only the native engine heeds: then there is no other to turn to."""
        switched = (getattr(self, name) != type(self).model_fields[name].default for name in NATIVE_SWITCHES.values())
        return bool(self.quantize) or self.path != "auto" or any(switched)

    def _check_engine(self) -> None:
        """What an engine would not heed is not to be asked of it."""
        of_vllm = [f"--tensor-parallel {self.tensor_parallel}"] if self.tensor_parallel > 1 else []
        of_vllm += [f"--vllm-quantization {self.vllm_quantization}"] if self.vllm_quantization else []
        of_native = [f"--quantize {self.quantize}"] if self.quantize else []
        of_native += [f"--path {self.path}"] if self.path != "auto" else []
        of_native += [flag for flag, field in NATIVE_SWITCHES.items() if field in self.model_fields_set]
        if self.engine == "vllm":
            of_vllm.append("--engine vllm")
        if self.engine == "native":
            of_native.append("--engine native")
        both = bool(of_vllm and of_native)
        self.require(
            not both, f"{(of_vllm or [''])[0]} means vllm, which has no {(of_native or [''])[0]}; leave out one of them"
        )
        self.require(
            self.tensor_parallel == 1 or not set(":,") & set(self.device),
            f"--tensor-parallel {self.tensor_parallel} takes that many GPUs by itself, not --device {self.device}; "
            "give --device cuda, and choose among GPUs with CUDA_VISIBLE_DEVICES",
        )

    @property
    def calibrations(self) -> dict[str, Path | None]:
        """Of models and ensembles; None: not even what lies beside the model. Raises ConfigError."""
        named = self._of_models("calibration", "FILE", self.ensembles)
        return {name: None if value == "none" else Path(value) for name, value in named}

    @property
    def drift_references(self) -> dict[str, Path]:
        """Of models and ensembles. Raises ConfigError."""
        return {name: Path(file) for name, file in self._of_models("drift_reference", "FILE", self.ensembles)}

    @property
    def length_penalties(self) -> dict[str, float]:
        """Raises ConfigError."""
        return {
            name: self._number("length-penalty", value)
            for name, value in self._of_models("length_penalty", "NUMBER", self.ensembles)
        }

    @property
    def weights_of_attributes(self) -> dict[str, dict[str, float]]:
        """Raises ConfigError."""
        found: dict[str, dict[str, float]] = {}
        for name, value in self._of_models("attribute_weights", "attribute:NUMBER+attribute:NUMBER"):
            parts = [part.rpartition(":") for part in value.split("+")]
            if not all(attribute and separator for attribute, separator, _ in parts):
                raise ConfigError(f"--attribute-weights '{name}={value}': give NAME=helpful:0.7+safe:0.3")
            if len({attribute for attribute, _, _ in parts}) < len(parts):
                raise ConfigError(f"--attribute-weights '{name}={value}': an attribute has two weights")
            found[name] = {attribute: self._number("attribute-weights", number) for attribute, _, number in parts}
        return found

    def _of_models(self, option: str, wanted: str, ensembles: Collection[str] = ()) -> list[tuple[str, str]]:
        """(name, value) of each entry of a repeated option; the names are those of models, or `ensembles`."""
        flag, found = "--" + option.replace("_", "-"), []
        for entry in getattr(self, option):
            name, separator, value = entry.partition("=")
            if not separator or not value:
                raise ConfigError(f"{flag} {entry!r}: give NAME={wanted}")
            if name not in self.models and name not in ensembles:
                kinds = "--model or --ensemble" if ensembles else "--model"
                raise ConfigError(f"{flag} {entry!r}: no {kinds} is named '{name}'")
            if any(name == other for other, _ in found):
                raise ConfigError(f"{flag} {entry!r}: '{name}' has one already; repeat it for another model only")
            found.append((name, value))
        return found

    @staticmethod
    def _number(option: str, value: str) -> float:
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
        raise ConfigError(f"--{option}: {value!r} is not a number")

    @property
    def ensembles(self) -> dict[str, tuple[Aggregate, tuple[str, ...]]]:
        """Name -> how its members become one score, and which they are. Raises ConfigError."""
        named: dict[str, tuple[Aggregate, tuple[str, ...]]] = {}
        for entry in self.ensemble:
            match = re.fullmatch(r"([^=]+)=([^()]+)\(([^()]*)\)", entry.replace(" ", ""))
            aggregate = Aggregate.parse(match[2]) if match else None
            members = tuple(filter(None, match[3].split("+"))) if match else ()
            if match is None or aggregate is None or not is_model_name(match[1]):
                raise ConfigError(f"--ensemble {entry!r}: give NAME=mean(a+b), or min, median, mean-0.5std for mean")
            if len(set(members)) < max(2, len(members)):
                raise ConfigError(f"--ensemble {entry!r}: an ensemble has two members at least, each of them once")
            if unknown := [member for member in members if member not in self.models]:
                raise ConfigError(f"--ensemble {entry!r}: no --model is named {', '.join(unknown)}")
            if match[1] in named or match[1] in self.models:
                raise ConfigError(f"--ensemble {entry!r}: the name '{match[1]}' is taken")
            named[match[1]] = (aggregate, members)
        return named

    @property
    def models(self) -> dict[str, str]:
        """Name -> source. Without a name the folder's is taken. Raises ConfigError."""
        named: dict[str, str] = {}
        for entry in self.model:
            name, source = _name_and_source(entry)
            if name in named:
                raise ConfigError(f"--model: two models are named '{name}'; name them apart with NAME=FOLDER")
            named[name] = source
        return named


def _name_and_source(entry: str) -> tuple[str, str]:
    name, separator, source = entry.partition("=")
    if os.path.isdir(entry):  # whatever its path looks like; False for what is too long to be one
        name, source = Path(entry).resolve().name, entry
    elif not separator:
        name, source = entry.rpartition("/")[2], entry
    if not is_model_name(name) or not source:
        raise ConfigError(f"--model {entry!r}: give NAME=FOLDER, the name of letters, digits, '-', '_' and '.'")
    return name, source


def load_config(arguments: Sequence[str], file: Path | None = None) -> ServeConfig:
    """Raises ConfigError for unknown or wrong options, with the nearest spelling. `--help` exits."""
    return load_options(ServeConfig, SERVE, arguments, file)
