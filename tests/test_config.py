"""One declaration is a flag, a variable, a key of the file, a default and a help text; whatever is wrong is named."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from rewardserve.cli.main import VERBS
from rewardserve.config import ServeConfig, load_config
from rewardserve.options import OTHER_VERBS, PREFIX, SERVE, ConfigError, is_of_kubernetes

FIELDS = ServeConfig.model_fields
OPTIONS = [name for name in FIELDS if name != "config"]  # which says where the others may stand
OF_MODELS = {
    "calibration": "/x.json",
    "length_penalty": "0.01",
    "attribute_weights": "good:0.7+safe:0.3",
    "drift_reference": "/x.jsonl",
}
WRONG_OF_MODELS = {
    "calibration": ["WRONG", "a=", "c=/x.json"],
    "drift_reference": ["WRONG", "a=", "c=/x.jsonl"],
    "length_penalty": ["WRONG", "a=", "c=1", "a=much", "a=nan"],
    "attribute_weights": ["WRONG", "a=", "c=good:1", "a=good", "a=good:much", "a=:1"],
}
SPECIAL = {"host": ["h1", "h2", "h3"], "device": ["cpu", "cuda", "cuda:1"]}


def three_values(name: str) -> list[Any]:
    """Three valid values of an option, none of them its default."""
    field = FIELDS[name]
    if name == "model":
        return [["a=/x"], ["b=/y", "c=/z"], ["d=/w"]]
    if name in OF_MODELS:
        value = OF_MODELS[name]
        return [[f"a={value}"], [f"a={value}", f"b={value}"], [f"b={value}"]]
    if name == "ensemble":
        return [["e=mean(a+b)"], ["e=min(a+b)", "f=median(b+a)"], ["g=mean-0.5std(a+b)"]]
    if name in SPECIAL:
        return SPECIAL[name]
    if field.annotation is bool:
        return [not field.default, field.default, not field.default]
    if choices := [choice for choice in get_args(field.annotation) if choice != field.default]:
        return [choices[0], choices[1 % len(choices)], choices[0]]
    return [field.annotation(value) for value in (101, 102, 103)]


def as_flags(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [part for v in (value if isinstance(value, list) else [value]) for part in (flag, str(v))]


def as_variable(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(value: Any) -> str:
    return as_variable(value) if isinstance(value, bool) else repr(value)


@pytest.fixture
def file(tmp_path: Path):
    path = tmp_path / "server.toml"

    def write(text: str) -> Path:
        path.write_text(text)
        return path

    return write


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", OPTIONS)
def test_flag_beats_variable_beats_file_beats_default(name: str, file, monkeypatch: pytest.MonkeyPatch) -> None:
    by_flag, by_variable, by_file = three_values(name)
    assert getattr(load_config([]), name) == FIELDS[name].default
    path = file(f"{name} = {as_toml(by_file)}\n")
    assert getattr(load_config([], file=path), name) == by_file
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", as_variable(by_variable))
    assert getattr(load_config([]), name) == by_variable
    assert getattr(load_config([], file=path), name) == by_variable
    assert getattr(load_config(as_flags(name, by_flag), file=path), name) == by_flag
    assert getattr(load_config(as_flags(name, by_flag)), name) == by_flag


def test_the_file_is_named_by_flag_before_variable(file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.toml"
    other.write_text("port = 2")
    path = file("port = 1")
    monkeypatch.setenv(f"{PREFIX}CONFIG", str(other))
    assert load_config([]).port == 2
    for arguments in (["--config", str(path)], [f"--config={path}"]):
        assert load_config(arguments).port == 1
        assert load_config([*arguments, "--port", "3"]).port == 3


@pytest.mark.parametrize("name", OPTIONS)
def test_one_option_leaves_the_others_at_their_defaults(name: str) -> None:
    config = load_config(as_flags(name, three_values(name)[0]))
    implied = {"log_text": {"log_requests"}}.get(name, set())
    assert {n for n in FIELDS if getattr(config, n) != FIELDS[n].default} == {name} | implied


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_has_help_that_fits_a_line(name: str) -> None:
    description = FIELDS[name].description
    assert description and len(description) <= 100 and not description.endswith(".")
    assert "\n" not in description


def test_help_lists_every_flag_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_config(["--help"])
    assert not ended.value.code
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in text
        assert field.description.split("%")[0] in text, name


@pytest.mark.parametrize("verb", ["serve", *OTHER_VERBS])
def test_help_says_types_and_defaults_as_a_person_would(verb: str) -> None:
    done = subprocess.run([sys.executable, "-m", "rewardserve", verb, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--config TEXT" in done.stdout
    assert not re.search(r"list\[|\{,|,\W?\}|\(default:\s*\W?\)|\[\]|True|False|\0", done.stdout), done.stdout


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.annotation is not str])
@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_a_wrong_value_names_its_option_and_itself(name: str, way: str, file, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "model":
        if way != "file":
            pytest.skip("every string is a model")
        with pytest.raises(ConfigError, match="model"):
            load_config([], file=file("model = 3"))
        return
    if name == "ensemble":
        for wrong in (
            "WRONG",
            "e=mean",
            "e=mode(a+b)",
            "e=mean(a)",
            "e=mean(a+a)",
            "e=mean(a+a+b)",
            "e=mean(a+c)",
            "a=mean(a+b)",
            "=min(a+b)",
        ):
            with pytest.raises(ConfigError, match=f"--ensemble '{re.escape(wrong)}'"):
                load_config(["--model", "a=/x", "--model", "b=/y", "--ensemble", wrong]).check()
        return
    flag = "--" + name.replace("_", "-")
    if name in OF_MODELS:
        for wrong in WRONG_OF_MODELS[name]:
            with pytest.raises(ConfigError, match=flag):
                load_config(["--model", "a=/x", "--model", "b=/y", flag, wrong]).check()
        return
    if way == "flag":
        if FIELDS[name].annotation is bool:
            pytest.skip("a flag has no value")
        arguments = [flag, "WRONG"]
    else:
        arguments = []
    if way == "variable":
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", "WRONG")
    path = file(f"{name} = 'WRONG'") if way == "file" else None
    with pytest.raises(ConfigError, match=rf"{flag} \(or {PREFIX}{name.upper()}\): .*'WRONG'"):
        load_config(arguments, file=path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--attribute-weights=a=good:1", "--attribute-weights=a=safe:1"],
            "'a' has one already; repeat it for",
        ),
        (["--attribute-weights=a=good:0.7+good:0.3"], "an attribute has two weights"),
        (["--length-penalty=a=0.1", "--length-penalty=a=0.2"], "'a' has one already"),
        (["--calibration=a=none", "--calibration=a=/f"], "'a' has one already"),
    ],
)
def test_nothing_that_makes_scores_is_left_out_without_a_word(arguments: list[str], words: str) -> None:
    """Of two entries for one model the last one would count alone."""
    with pytest.raises(ConfigError, match=words):
        load_config(["--model=a=/x", *arguments]).check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ensemble=e=mean(a+b)", "--calibration=e=none"], "nothing lies beside an ensemble"),
        (["--calibration=a=/f", "--attribute-weights=a=good:1"], "'a' was fitted to the model's own score"),
    ],
)
def test_a_calibration_that_cannot_be_applied_is_refused(arguments: list[str], words: str) -> None:
    models = ["--model=a=/x", "--model=b=/y"]
    load_config([*models, "--calibration=a=none", "--attribute-weights=a=good:1"]).check()
    with pytest.raises(ConfigError, match=words):
        load_config([*models, *arguments]).check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "65536"], "port"),
        (["--port", "-1"], "port"),
        (["--metrics-port", "-2"], "metrics-port"),
        (["--max-length", "-1"], "max-length"),
        (["--max-batch-sequences", "0"], "max-batch-sequences"),
        (["--max-message-mb", "2048"], "max-message-mb"),
        (["--grace-s", "-0.1"], "grace-s"),
        (["--grace-s", "nan"], "grace-s"),
        (["--stall-timeout-s", "0"], "stall-timeout-s"),
        (["--dtype", "int8"], "bfloat16"),
        (["--port"], "--port"),
        (["--host", ""], "host"),
        (["--device", "gpu"], "device"),
        (["--threads", "100000"], "threads"),
    ],
)
def test_a_value_out_of_bounds_names_its_option(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(arguments)


def test_all_wrong_values_are_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"port.*dtype|dtype.*port"):
        load_config(["--port", "x", "--dtype", "y"])


def test_a_metrics_port_of_minus_one_is_a_value_not_a_flag() -> None:
    assert load_config(["--metrics-port", "-1"]).metrics_port == -1


@pytest.mark.parametrize("name", FIELDS)
def test_a_misspelt_option_is_refused_with_the_right_spelling(name: str, file, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = name + "x"
    with pytest.raises(ConfigError, match=f"--{wrong}.*did you mean '--{name}'".replace("_", "-")):
        load_config([f"--{wrong}".replace("_", "-"), "1"])
    with pytest.raises(ConfigError, match=f"'{wrong}'.*did you mean '{name}'"):
        load_config([], file=file(f"{wrong} = 1"))
    monkeypatch.setenv(f"{PREFIX}{wrong.upper()}", "1")
    with pytest.raises(ConfigError, match=f"{PREFIX}{wrong.upper()}.*did you mean '{PREFIX}{name.upper()}'"):
        load_config([])


@pytest.mark.parametrize("name", ["zzzzzz", "qqq"])
def test_an_option_like_no_other_is_refused_without_a_guess(name: str, file, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=rf"--{name} is unknown; see --help"):
        load_config([f"--{name}", "1"])
    with pytest.raises(ConfigError, match=rf"'{name}' in .* is unknown; see --help$"):
        load_config([], file=file(f"{name} = 1"))
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", "1")
    with pytest.raises(ConfigError, match=rf"{name.upper()} is unknown"):
        load_config([])


def test_a_beginning_of_a_flag_is_no_flag() -> None:
    """An option added later must not change what a command line means."""
    with pytest.raises(ConfigError, match="port"):
        load_config(["--por", "1"])


def test_variables_of_other_programs_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARDSERVER_PORT", "x")
    monkeypatch.setenv("REWARDSERVE_SCORE_X", "x")
    assert load_config([]).port == FIELDS["port"].default


def test_a_file_that_cannot_be_read_is_named(file, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.toml", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ConfigError, match=words) as refused:
            load_config([], file=path)
        assert str(path) in str(refused.value)
    with pytest.raises(ConfigError, match=r"server\.toml"):
        load_config([], file=file("port"))


def test_a_word_that_is_no_flag_is_named() -> None:
    with pytest.raises(ConfigError, match="model-folder"):
        load_config(["model-folder"])


def test_a_flag_with_underscores_is_told_the_right_spelling() -> None:
    with pytest.raises(ConfigError, match="did you mean '--max-length'"):
        load_config(["--max_length", "8"])


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_config([], file=path)


@pytest.mark.parametrize("name", ["port", "grace_s"])
def test_true_is_no_number(name: str, file) -> None:
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        load_config([], file=file(f"{name} = true"))


def test_every_verb_has_its_table() -> None:
    assert {*VERBS} - {SERVE} <= {*OTHER_VERBS}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[scroe]\nwindow = 3", "table 'scroe' in .* is unknown; did you mean 'score'?"),
        ("score = 3", r"key 'score' in .* must be a table: \[score\]"),
        ("[[score]]\nwindow = 3", "must be a table"),
        ("[serve]\nport = 3", "the server's keys stand at the top"),
    ],
)
def test_a_table_that_is_none_is_refused(text: str, said: str, file) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config([], file=file(text))


def test_tables_of_the_other_verbs_are_left_to_them(file) -> None:
    assert load_config([], file=file("port = 3\n" + "".join(f"[{verb}]\nx = 1\n" for verb in OTHER_VERBS))).port == 3


def test_a_file_with_a_byte_order_mark_or_too_deep_is_no_riddle(file) -> None:
    assert load_config([], file=file("\ufeffport = 3")).port == 3
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config([], file=file(f"model = {'[' * 10_000}{']' * 10_000}"))
    with pytest.raises(ConfigError, match=r"server\.toml: .*5000 digits"):
        load_config([], file=file(f"port = {'9' * 5000}"))


def test_the_file_may_be_named_by_a_variable_of_any_case(file, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("rewardserve_config", str(file("port = 3")))
    assert load_config([]).port == 3


# -- options that do not go together -------------------------------------------------------------------------------


def test_log_text_logs_every_request_unless_told_otherwise(file, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(["--log-text"]).log_requests
    assert load_config([], file=file("log_text = true")).log_requests
    failed_only = load_config(["--log-text", "--no-log-requests"])
    assert failed_only.log_text and not failed_only.log_requests
    monkeypatch.setenv(f"{PREFIX}LOG_REQUESTS", "false")
    assert not load_config(["--log-text"]).log_requests


def refusal(arguments: list[str]) -> str:
    """What is said against them; empty where they are taken."""
    try:
        load_config(arguments).check()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no model: give --model"),
        (["--model=a=/x", "--port=9090"], "--port and --metrics-port are both 9090"),
        (["--model=a=/x", "--log-requests", "--log-level=warning"], "--log-level warning"),
        (["--model=a=/x", "--log-text", "--log-level=error"], "--log-level error"),
        (["--model=a=/x", "--path=padded", "--compile=on"], "--compile on"),
        (["--model=a=/x", "--path=padded", "--quantize=int8"], "--quantize"),
        (["--model=a=/x", "--path=padded", "--host-cache-mb=100"], "--host-cache-mb"),
        (["--model=a=/x", "--no-own-kernels", "--quantize=int8"], "--no-own-kernels"),
        (["--model=a=/x", "--engine=vllm", "--no-own-kernels"], "which has no --own-kernels"),
        (["--model=a=/x", "--engine=vllm", "--path=packed"], "--engine vllm means vllm, which has no --path packed"),
        (["--model=a=/x", "--engine=vllm", "--quantize=int8"], "which has no --quantize int8"),
        (["--model=a=/x", "--engine=vllm", "--no-cuda-graphs"], "which has no --cuda-graphs"),
        (["--model=a=/x", "--engine=native", "--tensor-parallel=2"], "--tensor-parallel 2 .* no --engine native"),
        (["--model=a=/x", "--vllm-quantization=fp8", "--quantize=fp8"], "--vllm-quantization fp8 .* no --quantize fp8"),
        (["--model=a=/x", "--tensor-parallel=2", "--device=cuda:1"], "not --device cuda:1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], said: str) -> None:
    assert re.search(said, refusal(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model=a=/x"],
        ["--allow-model-control"],
        ["--model=a=/x", "--port=0", "--metrics-port=0", "--log-text"],
        ["--model=a=/x", "--engine=vllm", "--tensor-parallel=2", "--vllm-quantization=fp8", "--device=cuda"],
        ["--model=a=/x", "--engine=native", "--quantize=int8", "--no-cuda-graphs"],
    ],
)
def test_options_that_go_together_are_taken(arguments: list[str]) -> None:
    assert refusal(arguments) == ""


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ([], False),
        (["--cuda-graphs", "--share-backbone", "--host-cache-mb=0", "--compile=on"], False),  # as it is anyway
        (["--host-cache-mb=100"], True),
        (["--no-own-kernels"], True),
        (["--no-cuda-graphs"], True),
        (["--path=packed"], True),
        (["--quantize=int8"], True),
    ],
)
def test_what_only_the_native_engine_heeds_means_the_native_engine(arguments: list[str], meant: bool) -> None:
    assert load_config(["--model=a=/x", *arguments]).means_native == meant


# -- what Kubernetes puts into the environment ---------------------------------------------------------------------


def of_a_service(name: str, protocol: str = "tcp") -> dict[str, str]:
    port = f"{name}_PORT_50051_{protocol.upper()}"
    return {
        f"{name}_SERVICE_HOST": "10.0.0.1",
        f"{name}_SERVICE_PORT": "50051",
        f"{name}_SERVICE_PORT_GRPC": "50051",
        f"{name}_PORT": f"{protocol}://10.0.0.1:50051",
        port: f"{protocol}://10.0.0.1:50051",
        f"{port}_ADDR": "10.0.0.1",
        f"{port}_PORT": "50051",
        f"{port}_PROTO": protocol,
    }


@pytest.mark.parametrize("service", ["REWARDSERVE", "REWARDSERVE_METRICS", "REWARDSERVE_SCORE"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_service_of_our_name_is_no_option(service: str, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in of_a_service(service, protocol).items():
        monkeypatch.setenv(name, value)
    config = load_config([])
    assert (config.port, config.metrics_port) == (FIELDS["port"].default, FIELDS["metrics_port"].default)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REWARDSERVE_PORT", "tcp:50051"),
        ("REWARDSERVE_PROT", "tcp://10.0.0.1:50051"),
        ("REWARDSERVE_SERVICE", "x"),
        ("REWARDSERVE_PORT_50051", "x"),
        ("REWARDSERVE_PORT_50051_TCP_HOST", "x"),
        ("REWARDSERVE_SERVICE_HOSTS", "x"),
    ],
)
def test_what_only_resembles_a_service_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError):
        load_config([])


@pytest.mark.parametrize("name", FIELDS)
def test_no_option_is_taken_for_a_service(name: str) -> None:
    assert not is_of_kubernetes(f"{PREFIX}{name.upper()}", "50051")


# -- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["a=/with,comma", "a=[x]", "a={x}", 'a="x"', "null", "a=null", "a=-1", "a=é"])
def test_a_flag_is_taken_as_it_stands(entry: str) -> None:
    assert load_config(["--model", entry]).model == [entry]
    assert load_config([f"--model={entry}", "--model", "b=/y"]).model == [entry, "b=/y"]


@pytest.mark.parametrize(
    ("given", "models"),
    [
        ([], {}),
        (["a=/x"], {"a": "/x"}),
        (["a=/x", "b=org/model"], {"a": "/x", "b": "org/model"}),
        (["org/model"], {"model": "org/model"}),
        (["a=/x=y"], {"a": "/x=y"}),
        (["/no/such/folder"], {"folder": "/no/such/folder"}),
    ],
)
def test_models_are_names_and_sources(given: list[str], models: dict[str, str]) -> None:
    arguments = [part for entry in given for part in ("--model", entry)]
    assert load_config(arguments).models == models


def test_a_folder_names_its_model_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    for entry in (str(folder), f"{folder}/", f"{folder}/../my-model"):
        assert load_config(["--model", entry]).models == {"my-model": entry}
    monkeypatch.chdir(folder)
    assert load_config(["--model", "."]).models == {"my-model": "."}


@pytest.mark.parametrize("given", [["a=/x", "a=/y"], ["org/m", "other/m"], ["m=/x", "org/m"]])
def test_two_models_of_one_name_are_refused_with_the_way_out(given: list[str]) -> None:
    config = load_config([part for entry in given for part in ("--model", entry)])
    with pytest.raises(ConfigError, match="NAME=FOLDER"):
        _ = config.models


def test_one_variable_may_hold_several_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}MODEL", "a=/x,b=/y")
    assert load_config([]).models == {"a": "/x", "b": "/y"}
    monkeypatch.setenv(f"{PREFIX}MODEL", "")
    assert load_config([]).models == {}


def test_a_list_that_is_none_is_told_with_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, said in {"[": "Expecting value", "[" * 100_000: "nested too deeply"}.items():
        monkeypatch.setenv("REWARDSERVE_MODEL", value)
        with pytest.raises(ConfigError, match=f"^--model .*{said}"):
            load_config([])


def test_a_file_may_hold_one_model_or_several(file) -> None:
    assert load_config([], file=file("model = 'a=/x'")).models == {"a": "/x"}
    assert load_config([], file=file("model = ['a=/x', 'b=/y']")).models == {"a": "/x", "b": "/y"}


# -- once faults ---------------------------------------------------------------------------------------------------


def test_a_misspelt_variable_in_lower_case_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("rewardserve_port", "7")
    assert load_config([]).port == 7
    monkeypatch.setenv("rewardserve_prt", "7")
    with pytest.raises(ConfigError, match="PRT"):
        load_config([])


def test_an_existing_folder_is_a_folder_whatever_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "lr=1e-5" / "final"
    folder.mkdir(parents=True)
    assert load_config(["--model", str(folder)]).models == {"final": str(folder)}
    assert load_config(["--model", "x" * 300]).models == {"x" * 300: "x" * 300}, "too long to be one, as its load says"


@pytest.mark.parametrize("entry", ["=/x", "a=", "/", "org/model/", "my model"])
def test_a_model_without_a_usable_name_or_source_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="model"):
        _ = load_config(["--model", entry]).models


def test_spaces_between_models_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}MODEL", "a=/x, b=/y")
    assert load_config([]).models == {"a": "/x", "b": "/y"}
