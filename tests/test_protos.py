"""The wire: generated code is what the protos say, and every enum has a zero that means nothing by accident."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rewardserve.v1 import models_pb2, scoring_pb2

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "server" / "rewardserve" / "v1"
PINNED = "1.76.0"
# The environment of development has the pinned grpcio-tools; another interpreter that has them may be named instead.
PYTHON = os.environ.get("GRPC_TOOLS_PYTHON", sys.executable)
FILES = (scoring_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR)
ENUMS = [enum for file in FILES for enum in file.enum_types_by_name.values()]
# A zero that is an answer, not the lack of one; documented in the proto.
MEANT = {"OVERFLOW_ERROR", "GRANULARITY_OUTCOME", "STEP_REDUCTION_MIN"}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ask = "from importlib.metadata import version; print(version('grpcio-tools'))"
    found = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True)
    have = found.stdout.strip() or "none"
    if have != PINNED:
        pytest.fail(
            f"grpcio-tools {PINNED} is needed, {PYTHON} has {have}: pip install -e '.[dev]', "
            "or name an interpreter that has it in GRPC_TOOLS_PYTHON"
        )
    out = tmp_path_factory.mktemp("generated")
    script = ROOT / "protos" / "generate.sh"
    made = subprocess.run(
        ["bash", str(script), str(out)], env={**os.environ, "PYTHON": PYTHON}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return out / "rewardserve" / "v1"


def test_the_generated_code_is_what_the_script_makes(generated: Path) -> None:
    names = {path.name for path in generated.iterdir()}
    assert names | {"__init__.py"} == {path.name for path in GENERATED.iterdir() if path.is_file()}
    for name in sorted(names):
        made, kept = (generated / name).read_text(), (GENERATED / name).read_text()
        difference = "\n".join(list(difflib.unified_diff(kept.splitlines(), made.splitlines(), lineterm=""))[:20])
        assert made == kept, f"{name} is stale: run `make proto`\n{difference}"


def test_the_pin_is_the_dev_extras() -> None:
    assert f'"grpcio-tools=={PINNED}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_proto_path_is_the_python_path(file) -> None:
    assert file.package == "rewardserve.v1" and file.name.startswith("rewardserve/v1/")
    assert (ROOT / "protos" / file.name).is_file()


def test_every_proto_is_compiled() -> None:
    protos = {path.relative_to(ROOT / "protos").as_posix() for path in (ROOT / "protos").rglob("*.proto")}
    assert protos == {file.name for file in FILES}


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.name)
def test_an_enums_zero_is_unspecified_or_meant(enum) -> None:
    zero = enum.values_by_number[0].name
    assert zero.endswith("_UNSPECIFIED") or zero in MEANT
    if zero in MEANT:
        (line,) = [
            line
            for path in (ROOT / "protos").rglob("*.proto")
            for line in path.read_text().splitlines()
            if line.strip().startswith(f"{zero} =")
        ]
        assert "//" in line, f"{zero} is not documented"


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.name)
def test_an_enums_values_carry_its_name(enum) -> None:
    prefix = "".join("_" + c if c.isupper() else c.upper() for c in enum.name).lstrip("_") + "_"
    assert all(value.name.startswith(prefix) for value in enum.values)


def test_a_failed_item_has_no_number() -> None:
    item = scoring_pb2.ItemScore()
    assert not item.HasField("score"), "unset is not 0.0"
    item.score = 0.0
    assert item.HasField("score")
