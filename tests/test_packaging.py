"""What is shipped can be installed: the wheel, the client without torch, and every step of the Dockerfile.

No Docker engine is needed: the Dockerfile's own install commands are run in clean environments.
"""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IN_THIS = {"python": sys.executable, "pip": f"{sys.executable} -m pip"}

pytestmark = pytest.mark.timeout(600)


def run(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def stage_steps(stage: str) -> list[str]:
    """The instructions of one stage, continuation lines joined."""
    body = re.split(r"^FROM .* AS ", DOCKERFILE, flags=re.M)
    text = next(part for part in body if part.startswith(stage + "\n"))
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines()[1:] if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel stage leaves in its root, from a copy of what it copies."""
    source, root = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("root")
    for step in stage_steps("wheel"):
        if step.startswith("COPY"):
            *sources, target = step.split()[1:]
            for name in sources:
                run("cp", "-r", ROOT / name, source / target)
        elif step.startswith("RUN"):
            command = re.sub(r"(?<=\s)/(?=wheels|requirements)", f"{root}/", step.removeprefix("RUN "))
            command = re.sub(r"^(pip|python)\b", lambda found: IN_THIS[found[1]], command)
            run("sh", "-c", command, cwd=source)
    return root


@pytest.fixture(scope="module")
def wheels(built: Path) -> Path:
    return built / "wheels"


@pytest.fixture(scope="module")
def client_python(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with `pip install rewardserve` and nothing else."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile", *wheels.glob("*.whl"))
    return folder / "bin" / "python"


def test_every_path_the_dockerfile_copies_exists() -> None:
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+)$", DOCKERFILE, flags=re.M)
    assert copied
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in copied:
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
            assert name not in ignored, f"{name} is not in the build context"


def test_every_extra_the_dockerfile_and_the_readme_name_exists() -> None:
    texts = DOCKERFILE + (ROOT / "README.md").read_text() + (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:whl\)|rewardserve|\.)\[([a-z,]+)\]", texts))
    assert named
    assert {extra for group in named for extra in group.split(",")} <= set(PROJECT["optional-dependencies"])


def test_both_images_run_as_an_unprivileged_user_and_ask_the_health_service() -> None:
    for stage in ("cpu", "cuda"):
        steps = stage_steps(stage)
        (user,) = [index for index, step in enumerate(steps) if step.startswith("USER")]
        assert int(steps[user].split()[1]) > 0, "Kubernetes' runAsNonRoot does not take a name"
        assert user < next(i for i, s in enumerate(steps) if s.startswith("ENTRYPOINT"))
        assert any(step.startswith("HEALTHCHECK") and '["rewardserve", "health"]' in step for step in steps)


def test_a_change_of_the_server_fetches_nothing_it_stands_on_anew() -> None:
    """A layer is made again when what was copied before it changes."""
    for stage in ("cpu", "cuda"):
        steps = stage_steps(stage)
        first = next(index for index, step in enumerate(steps) if step.startswith("RUN pip"))
        assert "requirements.txt" in steps[first]
        assert not any("/wheels" in step for step in steps[:first])


def test_the_torch_version_for_machines_without_a_gpu_is_named_in_one_place() -> None:
    version = (ROOT / "constraints-cpu.txt").read_text().splitlines()[-1].removeprefix("torch==")
    tracked = run("git", "-C", ROOT, "ls-files").split()
    named = [name for name in tracked if Path(ROOT / name).suffix in {".toml", ".txt", "", ".sh", ".yml"}]
    holders = [name for name in named if version in (ROOT / name).read_text(errors="ignore")]
    assert holders == ["constraints-cpu.txt"]


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheels: Path) -> None:
    (wheel,) = wheels.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shared = {name for name in held if ".data/data/share/doc/rewardserve/" in name}
    tracked = run("git", "-C", ROOT, "ls-files", "server", "kernels").split()
    assert held - shared == {name.partition("/")[2] for name in tracked}
    assert {Path(name).name for name in shared} == {"models.md", "alerts.yml", "models.proto", "scoring.proto"}


def test_the_plain_install_is_a_client_without_torch_and_numpy(client_python: Path) -> None:
    code = (
        "import rewardserve.client, sys; "
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules); "
        "import importlib.resources; "
        "assert (importlib.resources.files('rewardserve') / 'py.typed').is_file(); "  # or no checker reads its types
        "print(rewardserve.client.RewardClient.__name__)"
    )
    assert run(client_python, "-W", "error", "-c", code).strip() == "RewardClient"
    installed = run(client_python, "-m", "pip", "list", "--format=freeze").lower()
    assert "torch" not in installed and "numpy" not in installed


@pytest.mark.parametrize(
    ("verb", "extra"), [("serve", "server"), ("rank", "cli"), ("eval", "eval"), ("train", "train")]
)
def test_a_verb_that_needs_more_than_the_client_says_all_there_is_to_install(
    client_python: Path, verb: str, extra: str
) -> None:
    done = subprocess.run([client_python, "-m", "rewardserve", verb], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"pip install 'rewardserve[{extra}]'" in done.stderr and "Traceback" not in done.stderr


def test_with_the_extra_cli_every_verb_turns_to_a_server_elsewhere_and_none_needs_torch(
    client_python: Path, wheels: Path, tmp_path: Path
) -> None:
    (wheel,) = wheels.glob("*.whl")
    run(client_python, "-m", "pip", "install", "-q", "--no-compile", "--target", tmp_path / "cli", f"{wheel}[cli]")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "cli")}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    score, rank = ("score", rows, tmp_path / "scores.jsonl"), ("rank", "--prompt=p", "--response=a", "--response=b")
    for verb, *arguments in (("health",), ("models",), score, rank, ("bench", "--workload=short_items")):
        command = [client_python, "-m", "rewardserve", verb, *arguments, "--endpoint=127.0.0.1:1", "--timeout=1"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        assert "127.0.0.1:1" in done.stderr and "pip install" not in done.stderr
    offline = subprocess.run(
        [client_python, "-m", "rewardserve", *score, "--model", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert offline.returncode == 1 and "pip install 'rewardserve[server]'" in offline.stderr


def test_the_steps_of_the_cpu_image_succeed_in_a_clean_environment(
    built: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("server")
    venv.create(folder, with_pip=True)
    for step in stage_steps("cpu"):
        if not step.startswith("RUN pip"):
            continue
        command = step.removeprefix("RUN ").replace("/tmp/", f"{built}/")
        command = command.replace("pip ", f"{folder}/bin/python -m pip ")
        command = command.replace(f"{built}/constraints-cpu.txt", str(ROOT / "constraints-cpu.txt"))
        # The index for CPU wheels of torch is the image's own affair: here pip's own configuration says where from.
        command = re.sub(r"--extra-index-url \S+", "", command)
        # Compiling all of torch takes a minute, and next to nothing of it is run here.
        run("sh", "-c", command.replace("install", "install -q --no-compile"))
    assert "Serves reward models" in run(folder / "bin" / "rewardserve", "serve", "--help")
    version = run(folder / "bin" / "python", "-c", "import torch; print(torch.__version__)")
    assert f"torch=={version.partition(chr(43))[0].strip()}" in (ROOT / "constraints-cpu.txt").read_text()
    health = subprocess.run(
        [folder / "bin" / "rewardserve", "health", "--endpoint", "127.0.0.1:1", "--timeout", "1"],
        capture_output=True,
        text=True,
    )
    assert health.returncode == 1 and "127.0.0.1:1" in health.stderr
