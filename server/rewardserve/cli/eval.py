"""`rewardserve eval INPUT`: how good a reward model is, by pairs or rated responses, with a report and pictures.

Exit codes: 0; 1 if the run could not go on, if no response at all could be scored or, with --strict, if any could not;
2 for wrong usage, a bad row included; 130 after Ctrl-C. A run that ends early goes on where it stopped.
"""

import asyncio
import difflib
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from rewardserve.cli.running import complain, guarded
from rewardserve.cli.scorer import Scorer, ScoringOptions, open_scorer
from rewardserve.options import ConfigError, Repeated, load_options
from rewardserve.types import FINISHED

if TYPE_CHECKING:  # they need scipy, of the extra `eval`; so they are imported when that is known to be there
    from rewardserve.cli.eval_scores import Plan, Scores
    from rewardserve.evaluation.data import Judged, ScoredPrompt
    from rewardserve.evaluation.report import Report

EXTRA = ("numpy", "scipy", "matplotlib")
PICTURES = (".png", ".svg", ".pdf")


class EvalOptions(ScoringOptions):
    """Judges a reward model: ranking accuracy, calibration, agreement, length bias, suites, best-of-N, with pictures.

    A row of INPUT is {"prompt": "...", "responses": [...], "ratings": [...]} or {"prompt": "...", "chosen": "...",
    "rejected": "..."}, with messages for prompt, and with or without "domain"; a pair may have a "margin".
    """

    model: str = Field(
        default="",
        description="judge offline: load this checkpoint (FOLDER or hub name) here, and no calibration beside it",
    )
    input: CliPositionalArg[str] = Field(
        description="JSONL of pairs or rated responses, plain or .gz, - for stdin; rows as above"
    )
    output: str = Field(
        default="eval", description="folder for scores.jsonl, report.json and report.html; made if it is not there"
    )
    resume: bool = Field(default=True, description="keep the scores the folder holds and score only what is missing")
    strict: bool = Field(default=False, description="exit with 1 if any response could not be scored")
    min_gap: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="ratings, or margins, must differ by more to make a pair"
    )
    in_domain: Repeated = Field(
        default=[], description="domain the model is for; repeat for several; compared with all others"
    )
    suites: bool = Field(default=True, description="spoil good answers (padding, flattery, ...) and score those too")
    suite_prompts: int = Field(default=200, ge=0, description="prompts the suites are made of, at most; 0: all")
    fit_calibration: str = Field(default="", description="write what turns scores into probabilities, as JSON")
    calibration_kind: Literal["temperature", "affine", "isotonic"] = Field(
        default="temperature", description="what --fit-calibration fits; the report compares all of them"
    )
    picture: str = Field(
        default="", description="draw accuracy, calibration and best-of-N side by side: FILE.png, .svg or .pdf"
    )
    seed: int = Field(default=0, ge=0, description="of the suites, the intervals and the folds")

    def check(self) -> None:
        """Raises ConfigError for what cannot be done; all of it before anything is scored."""
        super().check()
        for name in EXTRA:
            self.require(find_spec(name) is not None, f"eval needs {name}: pip install 'rewardserve[eval]'")
        given = "calibration_kind" in self.model_fields_set
        self.require(bool(self.fit_calibration) or not given, "--calibration-kind goes with --fit-calibration FILE")
        for option, path in (("fit-calibration", self.fit_calibration), ("picture", self.picture)):
            folder = Path(path).absolute().parent
            there = folder.is_dir() and os.access(folder, os.W_OK)
            self.require(not path or there, f"--{option} {path}: {folder} is no folder to write to")
        known = not self.picture or Path(self.picture).suffix in PICTURES
        self.require(known, f"--picture {self.picture}: its name ends in one of {', '.join(PICTURES)}")

    @property
    def input_name(self) -> str:
        """As text: bytes that are none would be refused by every file it is written to."""
        return "stdin" if self.input == "-" else Path(self.input).name.encode(errors="replace").decode()


def run(arguments: Sequence[str]) -> int:
    return guarded("eval", lambda: _eval(load_options(EvalOptions, "eval", arguments)))


def _eval(options: EvalOptions) -> int:
    options.check()
    from rewardserve.cli.eval_rows import read_judged
    from rewardserve.cli.eval_summary import show

    judged, digest = read_judged(options.input)
    _check_domains(options, judged)
    folder = _make_folder(options.output)
    plan = _plan(options, judged)
    # What follows waits for nothing, so it is no part of it: an interrupt would be put off to the next wait, for ever.
    scorer, scores = asyncio.run(_scored(options, plan, folder))
    for status, example in scores.examples.items():
        complain("eval", f"failed: {scores.failures[status]} x {status}: {example}{_advice(status)}")
    prompts = plan.prompts(scores)
    if not any(prompt.responses for prompt in prompts):
        complain("eval", "nothing to judge: no row could be scored")
        return 1
    report = _report(options, scorer, digest, plan, scores, prompts)
    show(report)
    _write(options, report, folder, prompts)
    return 1 if options.strict and scores.num_failed else 0


async def _scored(options: EvalOptions, plan: "Plan", folder: Path) -> "tuple[Scorer, Scores]":
    """The scorer is closed by then; it still says what it was."""
    from rewardserve.cli import eval_scores

    async with open_scorer(options, calibrated=False) as scorer:
        if options.fit_calibration and FINISHED in scorer.version:
            raise ConfigError(
                f"--fit-calibration: scores of '{scorer.name}' are finished where it is served (calibration, penalty, "
                "weights), and what is fitted to them would take its place; serve it without these options, and with "
                f"--calibration {scorer.name}=none if one lies beside the checkpoint, or give --model"
            )
        return scorer, await eval_scores.score_plan(plan, scorer, folder, options.input, options.resume)


def _check_domains(options: EvalOptions, judged: "Sequence[Judged]") -> None:
    known = sorted({each.domain for each in judged})
    for name in options.in_domain:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            near = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known[:8])}"
            raise ConfigError(f"--in-domain {name}: no row of INPUT has this domain; {near}")


def _make_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from None
    return Path(path)


def _plan(options: EvalOptions, judged: "Sequence[Judged]") -> "Plan":
    from rewardserve.cli.eval_scores import Plan
    from rewardserve.evaluation import suites

    altered = suites.make(judged, options.seed, options.suite_prompts) if options.suites else []
    return Plan(tuple(judged), tuple(altered), options.overflow)


def _report(
    options: EvalOptions,
    scorer: Scorer,
    digest: str,
    plan: "Plan",
    scores: "Scores",
    prompts: "Sequence[ScoredPrompt]",
) -> "Report":
    """Raises ConfigError where there are responses, and not one pair."""
    from rewardserve.evaluation import report, suites

    about = report.About(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        rewardserve=version("rewardserve"),
        model=scorer.name,
        version=scorer.version,
        input=options.input_name,
        input_sha256=digest,
        min_gap=options.min_gap,
        overflow=options.overflow,
        seed=options.seed,
        in_domain=tuple(options.in_domain),
        num_rows=len(plan.judged),
        num_responses=sum(len(prompt.responses) for prompt in prompts),
        num_failed=scores.num_failed,
        num_truncated=scores.num_truncated,
        kind=scores.kind,
    )
    found = ()
    if options.suites:
        all_scores = plan.judged_scores(scores), plan.altered, plan.altered_scores(scores)
        found = suites.results(plan.judged, *all_scores, options.min_gap)
    try:
        return report.build(about, prompts, found, options.in_domain)
    except report.NothingToJudge as error:
        raise ConfigError(str(error)) from None


def _advice(status: str) -> str:
    return "; see --overflow" if status == "OUT_OF_RANGE" else ""


# -- files -------------------------------------------------------------------------------------------------------------


def _write(options: EvalOptions, report: "Report", folder: Path, prompts: "Sequence[ScoredPrompt]") -> None:
    from rewardserve.evaluation import html, picture

    text = json.dumps(report.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    page = html.page(report, tuple(picture.pictures(report)))
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")
    written = [str(folder / "report.html"), str(folder / "report.json")]
    if options.picture:
        picture.overview(report, Path(options.picture))
        written.append(options.picture)
    if options.fit_calibration:
        _write_calibration(options, report, prompts)
        written.append(options.fit_calibration)
    print(f"wrote {', '.join(written)}", file=sys.stderr)


def _write_calibration(options: EvalOptions, report: "Report", prompts: "Sequence[ScoredPrompt]") -> None:
    from rewardserve.evaluation import calibration, calibration_file
    from rewardserve.evaluation.data import pairs_of
    from rewardserve.evaluation.report import mean_score

    pairs = pairs_of(prompts, options.min_gap)
    fitted = calibration.fit(options.calibration_kind, pairs.margin, mean_score(prompts))
    about, accuracy = report.about, report.ranking.accuracy
    if accuracy.value <= 0.5:  # of which no fit makes anything but that it does not know
        complain(
            "eval",
            f"--fit-calibration: {accuracy.value:.1%} of the pairs are ranked right: are chosen and rejected, "
            "or the ratings, the right way round? What was fitted says that the model knows nothing",
        )
    origin = calibration_file.Origin(about.model, about.version, about.input, accuracy.num_pairs, accuracy.num_prompts)
    calibration_file.write(Path(options.fit_calibration), fitted, origin)
