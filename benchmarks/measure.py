"""The measurement: all scores checked first, then rounds in which every provider does the same new work in turn.

A round gives every provider all groups of a workload at once, under beginnings that no cache has seen; what the groups
of one round have in common may be shared by whoever can. The order of the providers moves on by one each round. Latency
is that of one group sent alone to a provider that does nothing else, taken after the rounds.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import gate
import ids
from gate import Accuracy
from ids import Work
from peers.protocol import Job, Scores, rows_of
from providers import MACHINE, PROVIDERS, REFERENCE, ProviderFailed, Running, require
from work import ModelShape, Shared, least_seconds, shared

CHECK_SALT, FIRST_SALT, LATENCY_SALT = 100, 101, 900  # of three digits each, so that all are as long in tokens

Progress = Callable[[str], None]  # told what begins; called once for each of `num_steps`


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and with what."""

    job: Job
    works: tuple[Work, ...]
    providers: tuple[str, ...]
    rounds: int
    latency_groups: int  # at most, of each workload
    folder: Path  # for logs and the work of each round
    references: Path  # folder of the reference's scores, kept from run to run

    @property
    def num_steps(self) -> int:
        each = len(self.providers) * (self.rounds + 2) + self.rounds + 1
        return len(self.providers) + len(self.works) * each


@dataclass(slots=True)
class ProviderResult:
    """`failed` says why there is nothing else."""

    failed: str = ""
    accuracy: Accuracy | None = None
    seconds: list[float] = field(default_factory=list)  # of each round
    latencies: list[float] = field(default_factory=list)  # seconds, of each group alone
    peak_bytes: int = 0


@dataclass(slots=True)
class WorkloadResult:
    work: Work
    num_tokens: int  # of all pairs, prompt + response
    shared: Shared
    limit_pairs_per_s: float = 0.0
    flops_per_s: dict[str, float] = field(default_factory=dict)  # of each linear: of the best round
    providers: dict[str, ProviderResult] = field(default_factory=dict)


@dataclass(slots=True)
class Result:
    versions: dict[str, dict[str, str]]
    workloads: list[WorkloadResult]
    interrupted: bool = False


def measure(plan: Plan, progress: Progress) -> Result:
    """Raises RedGate if a score of ours is wrong, and NotMade if a peer's environment is missing.

    KeyboardInterrupt ends it with the workloads that were measured by then, if there are any.
    """
    require(plan.providers)
    with ExitStack() as stack:
        fleet = _Fleet(plan, stack, progress)
        results = [fleet.check(work) for work in plan.works]
        for number, result in enumerate(results):
            try:
                fleet.run_rounds(result)
            except KeyboardInterrupt:
                if not number:
                    raise
                return Result(fleet.versions, results[:number], interrupted=True)
        return Result(fleet.versions, results)


class _Fleet:
    """All providers, loaded."""

    def __init__(self, plan: Plan, stack: ExitStack, progress: Progress) -> None:
        self._plan, self._stack, self._progress = plan, stack, progress
        self._shape = ModelShape.of(Path(plan.job.model))
        self._running: dict[str, Running] = {}
        self._failed: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {}
        for name in plan.providers:  # one after the other: some choose their ways by measuring when they load
            progress(f"{name} loads")
            self._load(name, self._start(name))
        self._machine = stack.enter_context(Running(MACHINE, plan.job.threads, plan.folder / "machine.log"))
        self._machine.load(plan.job)

    def _start(self, name: str) -> Running:
        log = self._plan.folder / f"{name}.log"
        return self._stack.enter_context(Running(PROVIDERS[name], self._plan.job.threads, log))

    def _load(self, name: str, process: Running) -> None:
        try:
            self.versions[name] = process.load(self._plan.job)
            self._running[name] = process
        except ProviderFailed as error:
            self._failed[name] = str(error)

    def check(self, work: Work) -> WorkloadResult:
        """Scores everything once, which also warms every provider up."""
        groups = work.salted(CHECK_SALT)
        file = ids.write(groups, self._plan.folder / "check.json")
        rows = rows_of(groups)
        result = WorkloadResult(work, sum(map(len, rows)), shared(rows))
        result.providers = {name: ProviderResult() for name in self._plan.providers}
        self._progress(f"{work.workload.name}: reference")
        exact = self._exact(file)
        scores: dict[str, Scores] = {}
        for name in self._plan.providers:
            self._progress(f"{work.workload.name}: {name} is checked")
            self._try(result, name, lambda process, name=name: scores.update({name: process.score(file)[0]}))
        accuracy = gate.check(scores, exact)
        for name, each in accuracy.items():
            result.providers[name].accuracy = each
        for name in self._plan.providers:
            if PROVIDERS[name].ours and name not in accuracy:
                raise gate.RedGate(f"{work.workload.name}: {name} gave no scores: {result.providers[name].failed}")
        gate.refuse(accuracy, [name for name in accuracy if PROVIDERS[name].ours], work.workload.name)
        return result

    def run_rounds(self, result: WorkloadResult) -> None:
        name = result.work.workload.name
        rates = []
        for process in self._running.values():
            process.peak_bytes()
        for number in range(self._plan.rounds):
            file = ids.write(result.work.salted(FIRST_SALT + number), self._plan.folder / "round.json")
            self._progress(f"{name}: the machine, round {number + 1}")
            rates.append(self._machine.rates())
            for provider in _moved_on(self._plan.providers, number):
                self._progress(f"{name}: {provider}, round {number + 1}")
                self._try(result, provider, _timed(result.providers[provider], file))
        file = ids.write(result.work.salted(LATENCY_SALT), self._plan.folder / "latency.json")
        for provider in self._plan.providers:
            self._progress(f"{name}: {provider}, latency")
            self._try(result, provider, _latency(result.providers[provider], file, self._plan.latency_groups))
        result.flops_per_s = {linear: max(rate[linear] for rate in rates) for linear in rates[0]}
        seconds = least_seconds(self._shape, result.shared, result.flops_per_s)
        result.limit_pairs_per_s = result.work.num_pairs / seconds

    def _try(self, result: WorkloadResult, name: str, action: Callable[[Running], object]) -> None:
        """A provider that fails once is left alone from then on; so is one whose scores are wrong."""
        entry = result.providers[name]
        if entry.accuracy is not None and not entry.accuracy.right:
            return
        if name in self._failed or entry.failed:
            entry.failed = entry.failed or self._failed[name]
            return
        try:
            action(self._running[name])
        except ProviderFailed as error:
            entry.failed = str(error)

    def _exact(self, file: Path) -> Scores:
        """The reference's scores, kept for the next run with the same model and work."""
        weights = Path(self._plan.job.model).glob("*.safetensors")
        kept = self._plan.references / f"{_digest([file, *weights])}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with Running(REFERENCE, self._plan.job.threads, self._plan.folder / "hf_exact.log") as process:
                process.load(_exactly(self._plan.job))
                kept.write_text(json.dumps(process.score(file)[0]))
        return json.loads(kept.read_text())


def _timed(entry: ProviderResult, file: Path) -> Callable[[Running], None]:
    return lambda process: entry.seconds.append(process.score(file)[1])


def _latency(entry: ProviderResult, file: Path, num_groups: int) -> Callable[[Running], None]:
    def run(process: Running) -> None:
        entry.latencies = process.latencies(file, num_groups)
        entry.peak_bytes = process.peak_bytes()

    return run


def _moved_on(names: tuple[str, ...], by: int) -> tuple[str, ...]:
    by %= len(names)
    return names[by:] + names[:by]


def _exactly(job: Job) -> Job:
    return Job(**{**vars(job), "dtype": "float32"})


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
