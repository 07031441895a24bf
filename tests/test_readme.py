"""What the README says a newcomer can do, done: its code is run against a server with the demo model."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(f"demo={ROOT / 'examples' / 'demo_model'}") as server:
        yield server


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_ppo_and_best_of_n_examples_run_as_they_stand(server: ServerProcess) -> None:
    ppo, best_of_n = python_blocks()
    outputs = []
    for block in (ppo, best_of_n):
        assert "127.0.0.1:50051" in block
        code = block.replace("127.0.0.1:50051", server.endpoint)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.strip())
    assert re.fullmatch(r"\[-?\d+\.\d+, -?\d+\.\d+\]", outputs[0])
    assert outputs[1] == "Paris is the capital of France."


def test_the_examples_are_about_ten_lines() -> None:
    assert all(sum(bool(line.strip()) for line in block.splitlines()) <= 10 for block in python_blocks())


def test_every_folder_in_the_tree_exists_and_has_one_line() -> None:
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", README, flags=re.S)
    for line in tree.splitlines():
        base = ROOT / "server" / "rewardserve" if line.startswith("  ") else ROOT
        names, described = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        assert described
        for name in names.split():
            assert (base / name).exists(), line


def test_no_file_speaks_of_anything_but_the_project() -> None:
    """Paths of somebody's machine have no place in what is shipped."""
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    private = re.compile(r"/(?:work|home|root|opt|Users)/\w")
    texts = [name for name in tracked if Path(name).suffix in {".py", ".md", ".toml", ".txt", ".sh", ".json", ".jinja"}]
    assert [name for name in texts if private.search((ROOT / name).read_text())] == []
