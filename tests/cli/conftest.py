"""A real server with a fake engine, a tiny real checkpoint, and the verbs run in this process."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rewardserve.app import App
from rewardserve.cli import eval as eval_
from rewardserve.cli import health, models, rank, score
from rewardserve.config import ServeConfig
from rewardserve.engine.base import Engine, EngineInfo
from rewardserve.engine.fake import FakeEngine, fake_info
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.options import NativeOptions

MAX_LENGTH = 128  # tokens, of the fake engine
VERBS = {"score": score, "rank": rank, "eval": eval_, "models": models, "health": health}
MakeEngine = Callable[[str, str, str], Engine]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


class Server:
    """An App on a thread and an unused port."""

    def __init__(self, make_engine: MakeEngine, **options: object) -> None:
        self._app = App(ServeConfig(port=0, metrics_port=-1, **options), make_engine=make_engine)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._run(self._app.start())
        self.endpoint = f"--endpoint=127.0.0.1:{self._app.port}"

    def goes_down(self, name: str, reason: str, for_good: bool = False) -> None:
        """As a model's engine tells the server of itself."""
        listener = self._app.registry.get(name).engine._listener

        async def tell() -> None:
            (listener.on_failed if for_good else listener.on_down)(reason)

        self._run(tell())

    def stop(self) -> None:
        self._run(self._app.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)


@contextlib.contextmanager
def _serving(make_engine: MakeEngine, **options: object) -> Iterator[Server]:
    server = Server(make_engine, **options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a verb and gives back its exit code and what it wrote."""

    def run(verb: str, *arguments: object) -> Ran:
        capfd.readouterr()
        code = VERBS[verb].run([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 reward model of random weights with a tokenizer and a chat template."""
    import checkpoints  # of tests/support; loads torch

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    checkpoints.save_checkpoint(folder, texts=["What is two plus two? It is four, word by word."] * 4)
    return folder


@pytest.fixture(scope="session")
def toy_info(checkpoint: Path) -> EngineInfo:
    from rewardserve.models.text_export import export_text

    text = export_text(checkpoint)[0]
    told = {"architecture": "Qwen3ForSequenceClassification", "path": "padded", "path_reason": "the fake packs nothing"}
    return fake_info(max_length=MAX_LENGTH, vocab_size=400, text=text, **told)


@pytest.fixture(scope="session")
def server(toy_info: EngineInfo) -> Iterator[Server]:
    """Serves one model, `toy`."""
    with _serving(lambda *_: FakeEngine(toy_info), model=["toy=anywhere"]) as running:
        yield running


@pytest.fixture
def slow_server(toy_info: EngineInfo) -> Iterator[Server]:
    """As `server`, for what must be met half-way: a hundred requests a second, of one at a time."""
    with _serving(lambda *_: FakeEngine(toy_info, delay_s=0.01), model=["toy=anywhere"]) as running:
        yield running


@pytest.fixture
def controlled_server(toy_info: EngineInfo) -> Iterator[Server]:
    """Serves `toy`, and lets clients load and unload."""
    make_engine = lambda *_: FakeEngine(toy_info)  # noqa: E731
    with _serving(make_engine, model=["toy=anywhere"], allow_model_control=True) as running:
        yield running


@pytest.fixture
def ensemble_server(toy_info: EngineInfo) -> Iterator[Server]:
    """Serves `e`, an ensemble of `a` and `b`, and lets clients load and unload."""
    options = {"model": ["a=anywhere", "b=anywhere"], "ensemble": ["e=mean(a+b)"], "allow_model_control": True}
    with _serving(lambda *_: FakeEngine(toy_info), **options) as running:
        yield running


@pytest.fixture
def small_server(toy_info: EngineInfo) -> Iterator[Server]:
    """Serves `toy`, and takes messages of up to a megabyte."""
    with _serving(lambda *_: FakeEngine(toy_info), model=["toy=anywhere"], max_message_mb=1) as running:
        yield running


@pytest.fixture
def real_server(checkpoint: Path) -> Iterator[Server]:
    """Serves the tiny checkpoint, as `tiny`."""
    options = NativeOptions(str(checkpoint), prefix_cache_bytes=16 << 20)
    with _serving(lambda *_: NativeEngine(options), model=[f"tiny={checkpoint}"]) as running:
        yield running


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows, or lines as they are, to a file."""

    def write(*rows: dict | str, name: str = "in.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"
