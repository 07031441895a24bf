"""Whole programs: what a shell, a pipe or a full disk does to them is one line at most, and never a traceback."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from rewardserve.cli import health
from rewardserve.cli.main import VERBS
from rewardserve.options import PREFIX

HELP = [["--help"], ["--version"], ["score", "--help"], ["serve", "--help"]]
ANSWERS = [["models"], ["health"], ["rank", "--prompt=x", "--response=y"], ["score", "IN", "-"]]


def environment(**changes: str) -> dict[str, str]:
    """Python's own buffering, as outside of a container, and no options from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    return {**kept, "PYTHONUNBUFFERED": "", **changes}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rewardserve", *map(str, arguments)]


def run(*arguments: object, stdout: int = subprocess.PIPE, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        stdout=stdout,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=120,
        env=environment(**changes),
    )


@pytest.fixture
def arguments(request: pytest.FixtureRequest, server, rows_file) -> list[str]:
    source = str(rows_file({"prompt": "two?", "response": "four"}))
    given = [source if argument == "IN" else argument for argument in request.param]
    return given if given in HELP else [*given, server.endpoint]


@pytest.mark.parametrize("arguments", [*HELP, *ANSWERS], indirect=True, ids=" ".join)
def test_nobody_reads_what_is_printed(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = run(*arguments, stdout=writing)
    os.close(writing)
    assert ran.returncode == 1 and [line for line in ran.stderr.splitlines() if not line.startswith("scored")] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [*HELP, *ANSWERS], indirect=True, ids=" ".join)
def test_the_disk_is_full(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ran = run(*arguments, stdout=full.fileno())
    (line,) = [line for line in ran.stderr.splitlines() if not line.startswith("scored")]
    assert ran.returncode == 1 and line.startswith("rewardserve") and "No space left" in line


@pytest.mark.parametrize("arguments", [HELP[0], *ANSWERS], indirect=True, ids=" ".join)
def test_stdout_is_closed(arguments: list[str]) -> None:
    ran = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command(*arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert ran.returncode == 0 and "Traceback" not in ran.stderr


RENDERING_FOR_EVER = """
import threading
from concurrent.futures import ThreadPoolExecutor
from rewardserve.cli import serve

async def serves(config):
    ThreadPoolExecutor(1, thread_name_prefix=serve.TEXT_THREADS).submit(threading.Event().wait)
    return 0

serve._serve = serves
raise SystemExit(serve.run(["--allow-model-control"]))
"""


def test_a_server_ends_though_a_template_loops_for_ever() -> None:
    program = [sys.executable, "-c", RENDERING_FOR_EVER]
    assert subprocess.run(program, timeout=60, env=environment(), check=False).returncode == 0


@pytest.mark.parametrize("verb", [["models"], ["health", "--timeout=100"], ["score", "-", "-"]], ids=" ".join)
def test_an_interrupt_is_one_line(verb: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        program = subprocess.Popen(
            command(*verb, f"--endpoint=127.0.0.1:{silent.getsockname()[1]}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
        )
        try:
            connection, _ = silent.accept()  # so it is past its imports, and waits for an answer
            program.send_signal(signal.SIGINT)
            _, err = program.communicate(timeout=60)
            connection.close()
        finally:
            program.kill()
    assert program.returncode == 130 and err == f"rewardserve {verb[0]}: interrupted\n"


def test_what_is_wrong_with_a_servers_options_cannot_steer_the_terminal() -> None:
    ran = run("serve", "--p\x1b[31mrt=1")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert ran.stderr.startswith("rewardserve serve: flag --p\\u001b[31mrt is unknown; did you mean '--port'?")


def test_a_server_that_may_open_too_few_files_says_so() -> None:
    """Before it fails at whatever it opens last, in the words of that."""
    few = 'ulimit -n 30; exec "$@"'
    ran = subprocess.run(
        ["sh", "-c", few, "sh", *command("serve", "--model=rm=x", "--port=0", "--metrics-port=0")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1
    assert "no more than 30 files may be open" in ran.stderr


UNSHARE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]


def may_unshare() -> bool:
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_unshare(), reason="no namespaces for this user")
def test_the_first_process_of_a_container_ends_when_it_is_asked_to() -> None:
    """Not when it is killed, half a minute later."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        port = silent.getsockname()[1]
        container = [*UNSHARE, *command("health", "--timeout=100", f"--endpoint=127.0.0.1:{port}")]
        program = subprocess.Popen(container, env=environment())
        try:
            connection, _ = silent.accept()
            (first,) = psutil.Process(program.pid).children()
            first.terminate()
            assert program.wait(30) == 128 + signal.SIGTERM
            connection.close()
        finally:
            program.kill()
            program.wait()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_checks_the_whole_config_file(verb: str, tmp_path: Path) -> None:
    """In a process of its own, where no other verb has been imported."""
    file = tmp_path / "rewardserve.toml"
    for text, said in (("[scroe]", "did you mean 'score'?"), ("prot = 3", "did you mean 'port'?")):
        file.write_text(text)
        ran = run(verb, "--config", file)
        assert ran.returncode == 2 and said in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("said", "endpoint"),
    [
        ({"PORT": "tcp://10.0.0.1:50051", "HOST": "0.0.0.0"}, "127.0.0.1:50051"),  # Kubernetes', of a service
        ({"PORT": "7"}, "127.0.0.1:7"),
        ({"HOST": "10.0.0.5"}, "10.0.0.5:50051"),
        ({"HOST": "::", "CONFIG": "server.toml"}, "[::1]:9"),
        ({"PORT": "7", "CONFIG": "server.toml"}, "[fd00::5]:7"),
        ({"PORT": "none"}, "127.0.0.1:50051"),
    ],
)
def test_a_probe_asks_the_server_beside_it(said, endpoint: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("server.toml").write_text('port = 9\nhost = "[fd00::5]"\n[health]\ntimeout = 1\n')
    for name, value in said.items():
        monkeypatch.setenv(f"REWARDSERVE_{name}", value)
    assert health.beside() == endpoint


def test_a_probes_help_says_whom_it_asks() -> None:
    ran = run("health", "--help", REWARDSERVE_PORT="7", COLUMNS="200")
    assert ran.returncode == 0 and "(default: 127.0.0.1:7)" in ran.stdout


def test_scores_may_be_written_to_a_device_or_a_pipe(cli, server, rows_file, tmp_path: Path) -> None:
    source, pipe = rows_file({"prompt": "two?", "response": "four"}), tmp_path / "pipe"
    assert cli("score", source, "/dev/null", server.endpoint).code == 0
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert cli("score", source, pipe, server.endpoint).code == 0
    reader.join(timeout=30)
    assert read[0].count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_scores_are_not_read_back_from_a_device(cli, server, rows_file) -> None:
    ran = cli("score", rows_file({"prompt": "two?", "response": "four"}), "/dev/full", server.endpoint)
    assert ran.code == 1 and "No space left" in ran.err
