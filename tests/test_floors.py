"""Who may import whom (.importlinter), and what a fresh interpreter has loaded afterwards."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "server" / "rewardserve"
HEAVY = ("torch", "transformers", "triton", "safetensors")


def fresh(code: str) -> str:
    """What a new interpreter prints, away from the repository's root."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd="/", env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_contract_is_kept() -> None:
    """In a process of its own: the linter sets up logging for itself."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_the_contracts_have_teeth() -> None:
    """The tool sees imports inside of functions and of packages that are not ours."""
    import grimp

    graph = grimp.build_graph("rewardserve", "rewardserve_kernels", include_external_packages=True, cache_dir=None)
    assert graph.direct_import_exists(importer="rewardserve.models.spec", imported="torch")
    assert graph.direct_import_exists(importer="rewardserve.models.checkpoint", imported="huggingface_hub"), (
        "an import inside of a function"
    )


def test_the_native_engine_needs_nothing_beyond_torch_transformers_and_numpy() -> None:
    """So that it runs from the source tree on a machine where nothing can be installed."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests/support/bare")!r})
import sitecustomize
sitecustomize.WITHOUT.add("psutil")  # of which only a CPU's memory is asked
import rewardserve.engine.native.engine
print("loaded")
"""
    assert fresh(code).splitlines()[-1] == "loaded"


FRONT = (
    "rewardserve.client",
    "rewardserve.app",
    "rewardserve.config",
    "rewardserve.cli.main",
    "rewardserve.cli.serve",
    "rewardserve.cli.bench",
    "rewardserve.cli.train",
    "rewardserve.cli.eval_scores",
    "rewardserve.evaluation.html",
    "rewardserve.loadtest.loadgen",
    "rewardserve.transport.grpc_server",
    "rewardserve.service.score",
    "rewardserve.text.encoder",
    "rewardserve.engine.base",
    "rewardserve.engine.fake",
    "rewardserve.engine.process",
    "rewardserve.engine.choice",
    "rewardserve.engine.vllm_engine",
    "rewardserve.engine.vllm_options",
    "rewardserve.engine.replicas",
    "rewardserve.engine.native.scheduler",
    "rewardserve.engine.native.prefix_cache",
    "rewardserve.engine.native.options",
)


@pytest.mark.parametrize("module", FRONT)
def test_the_front_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert fresh(code) == "[]"


def base_dependencies() -> set[str]:
    """Import names of the packages `pip install rewardserve` brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {dependency.split(">")[0].split("=")[0] for dependency in project["dependencies"]}


def test_the_base_install_is_grpc_and_protobuf() -> None:
    assert base_dependencies() == {"grpcio", "protobuf", "googleapis-common-protos", "grpcio-status"}


def test_the_client_loads_nothing_but_the_standard_library_grpc_and_protobuf() -> None:
    """What grpc looks for by itself, and finds in a full environment, is not the client's doing."""
    code = (
        "import sys, grpc, grpc_status, google.protobuf; before = set(sys.modules); import rewardserve.client; "
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(n for n in names if n not in sys.stdlib_module_names and not n.startswith('_')))"
    )
    assert set(fresh(code).split()) <= {"rewardserve", "grpc", "grpc_status", "google"}


def test_the_client_works_where_nothing_else_can_be_imported() -> None:
    absent = ("pydantic", "pydantic_settings", "numpy", "jinja2", "tokenizers", "zmq", "msgspec", "rich", *HEAVY)
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from rewardserve.client import Group, RewardClient, TokenIds\n"
        "client = RewardClient('127.0.0.1:1'); client.close()\n"
        "print(len(TokenIds([1, 2, 3])), Group('prompt', ['a']).prompt)"
    )
    assert fresh(code) == "3 prompt"


def test_packages_below_the_top_are_empty_but_for_the_clients_door() -> None:
    """Or importing one module of a room would load all of it."""
    full = {path.parent.name for path in SERVER.rglob("__init__.py") if path.read_text().strip()}
    assert full <= {"rewardserve", "client"}


def test_importing_the_top_loads_nothing() -> None:
    code = "import sys, rewardserve; print(sorted(name for name in sys.modules if name.startswith('rewardserve.')))"
    assert fresh(code) == "[]"


def test_there_is_no_room_for_what_has_no_name() -> None:
    rooms = {path.name.removesuffix(".py") for path in [*SERVER.rglob("*.py"), *SERVER.rglob("*/")]}
    assert not rooms & {"utils", "util", "common", "helpers", "misc"}


def test_the_repositorys_own_folders_are_no_packages() -> None:
    """`kernels/__init__.py` would hide the package of that name which transformers imports."""
    for folder in ("kernels", "server", "tests", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists()
