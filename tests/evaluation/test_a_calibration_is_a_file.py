import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewardserve.evaluation import calibration_file
from rewardserve.evaluation.calibration_file import Affine, BadCalibration, Isotonic, Origin, Temperature, sigmoid

ORIGIN = Origin("rm", "v1", "heldout.jsonl", 900, 80)
KINDS = [Temperature(2.5), Affine(0.4, -1.0), Isotonic((-1.0, 0.0, 1.0), (0.2, 0.5, 0.8))]


@pytest.mark.parametrize("calibration", KINDS, ids=lambda each: each.kind)
def test_what_is_written_is_read_again(calibration, tmp_path):
    path = tmp_path / "calibration.json"
    calibration_file.write(path, calibration, ORIGIN)
    assert calibration_file.read(path) == (calibration, ORIGIN)
    values = json.loads(path.read_text())
    assert values["kind"] == calibration.kind and values["origin"]["version"] == "v1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "v0"}, "format: must be 'rewardserve.calibration.v1'"),
        ({"kind": "platt"}, "kind: must be 'temperature' or 'affine' or 'isotonic'"),
        ({"kind": ["affine"]}, "kind: must be"),
        ({"kind": "affine"}, "scale: must be there, in a calibration of kind 'affine'"),
        ({"temperature": 0}, "temperature: must be a number above 0"),
        ({"temperature": "1"}, "temperature: must be a number above 0"),
        ({"temperature": True}, "temperature: must be a number above 0"),
        ({"temperature": math.inf}, "temperature: must be a number above 0"),
        ({"kind": "affine", "scale": 1, "offset": math.nan}, "offset: must be a number"),
        ({"kind": "isotonic", "margins": [], "probabilities": []}, "margins: must be a list of numbers"),
        ({"kind": "isotonic", "margins": [0, 1], "probabilities": [0.5]}, "as many as there are margins"),
        ({"kind": "isotonic", "margins": [1, 0], "probabilities": [0, 1]}, "margins: must be in ascending order"),
        ({"kind": "isotonic", "margins": [0, 1], "probabilities": [1, 0]}, "probabilities: must be in ascending order"),
        ({"kind": "isotonic", "margins": [0, 1], "probabilities": [0, 2]}, "probabilities: must be between 0 and 1"),
        ({"origin": None}, "origin: must be an object of input, model"),
        ({"origin": {"model": "rm"}}, "origin: must be an object of input, model"),
    ],
)
def test_what_is_no_calibration_is_refused_by_its_field(tmp_path, changes, said):
    path = tmp_path / "calibration.json"
    calibration_file.write(path, Temperature(1.0), ORIGIN)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadCalibration) as refused:
        calibration_file.read(path)
    assert str(path) in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000])
def test_a_file_that_is_something_else_is_refused(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(BadCalibration):
        calibration_file.read(path)


def test_a_key_that_is_there_twice_is_refused_by_its_name(tmp_path):
    path = tmp_path / "calibration.json"
    calibration_file.write(path, Temperature(1.0), ORIGIN)
    path.write_text(path.read_text().replace('"temperature": 1.0,', '"temperature": 1.0, "temperature": 2.5,'))
    with pytest.raises(BadCalibration, match="'temperature' is there twice"):
        calibration_file.read(path)


@given(st.floats(-2000, 2000))
def test_probabilities_of_the_two_sides_add_up_to_one(margin):
    for calibration in KINDS:
        assert calibration.probability(margin) + calibration.probability(-margin) == pytest.approx(1.0)
    assert sigmoid(margin) + sigmoid(-margin) == pytest.approx(1.0)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1)), min_size=1, max_size=8, unique_by=lambda each: each[0]),
    st.floats(-7, 7),
)
def test_an_isotonic_curve_is_straight_between_its_points(points, margin):
    margins, probabilities = sorted(m for m, _ in points), sorted(p for _, p in points)
    found = Isotonic(tuple(margins), tuple(probabilities)).probability(margin)
    assert found == pytest.approx(float(np.interp(margin, margins, probabilities)), abs=1e-9)


def test_reading_one_needs_the_standard_library_only():
    import subprocess
    import sys

    code = (
        "import sys, rewardserve.evaluation.calibration_file; "
        "print({'numpy', 'scipy', 'torch', 'pydantic'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
