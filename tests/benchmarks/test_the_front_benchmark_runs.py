"""What measures the front runs with each of the servers it compares, and all calls are answered."""

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "front.py"


def test_each_server_answers_single_calls() -> None:
    options = ("--rounds", "1", "--seconds", "0.2", "--open-seconds", "0", "--patience", "0", "--only", "single idle.")
    ran = subprocess.run([sys.executable, BENCHMARK, *options], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    rates = dict(re.findall(r"^(\w+) single idle +(\d+) ", ran.stdout, re.MULTILINE))
    assert {"fake", "child", "echo"} <= rates.keys() and all(int(rate) > 0 for rate in rates.values()), ran.stdout
