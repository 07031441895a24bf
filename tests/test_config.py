"""One declaration is a flag, a variable, a key of the file, a default and a help text; whatever is wrong is named."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from rewardserve.config import ServeConfig, load_config
from rewardserve.options import PREFIX, ConfigError

FIELDS = ServeConfig.model_fields
OPTIONS = [name for name in FIELDS if name != "config"]  # which says where the others may stand
SPECIAL = {"host": ["h1", "h2", "h3"], "device": ["cpu", "cuda", "cuda:1"]}


def three_values(name: str) -> list[Any]:
    """Three valid values of an option, none of them its default."""
    field = FIELDS[name]
    if name == "model":
        return [["a=/x"], ["b=/y", "c=/z"], ["d=/w"]]
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
    assert {n for n in FIELDS if getattr(config, n) != FIELDS[n].default} == {name}


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


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.annotation is not str])
@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_a_wrong_value_names_its_option_and_itself(name: str, way: str, file, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "model":
        if way != "file":
            pytest.skip("every string is a model")
        with pytest.raises(ConfigError, match="model"):
            load_config([], file=file("model = 3"))
        return
    flag = "--" + name.replace("_", "-")
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


@pytest.mark.parametrize("entry", ["=/x", "a=", "/", "org/model/", "my model"])
def test_a_model_without_a_usable_name_or_source_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="model"):
        _ = load_config(["--model", entry]).models


def test_spaces_between_models_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}MODEL", "a=/x, b=/y")
    assert load_config([]).models == {"a": "/x", "b": "/y"}
