"""`rewardserve eval` of the demo model, which knows good answers from spoilt ones, and of a server."""

import gzip
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rewardserve.cli import eval as eval_
from rewardserve.cli.eval_rows import read_judged
from rewardserve.evaluation import calibration_file
from rewardserve.evaluation.data import Scored, ScoredPrompt, pairs_of
from server_process import ServerProcess

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO_MODEL = EXAMPLES / "demo_model"
RATINGS = {"good": 1.0, "truncated": 0.5, "wrong": 0.4, "repeated": 0.2, "off-topic": 0.1, "shuffled": 0.1, "lazy": 0.0}
ARGUMENTS = ("--threads=1", "--seed=1", "--min-gap=0.3")


def demo_rows() -> list[dict]:
    """The answers of the demo, rated by what they are, and pairs of them in a domain of their own."""
    rows = []
    for line in (EXAMPLES / "demo.jsonl").read_text().splitlines():
        row = json.loads(line)
        rated = {"messages": row["messages"], "responses": row["responses"], "domain": "answers"}
        rows.append({**rated, "ratings": [RATINGS[label] for label in row["labels"]]})
        by_label = dict(zip(row["labels"], row["responses"], strict=True))
        prompt = row["messages"][-1]["content"] + " Please."
        rejected = next(text for label, text in by_label.items() if label != "good")
        rows.append({"prompt": prompt, "chosen": by_label["good"], "rejected": rejected, "domain": "pairs"})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One run of the demo model, offline, and all it leaves behind."""
    folder = tmp_path_factory.mktemp("eval")
    source = write(folder / "in.jsonl", demo_rows())
    files = f"--picture={folder / 'p.png'}", f"--fit-calibration={folder / 'c.json'}", f"--output={folder / 'out'}"
    code = eval_.run([str(source), f"--model={DEMO_MODEL}", "--in-domain=answers", *ARGUMENTS, *files])
    report = json.loads((folder / "out" / "report.json").read_text())
    return SimpleNamespace(code=code, folder=folder, source=source, report=report)


def test_it_ends_well_and_the_json_holds_every_finding(judged):
    assert judged.code == 0
    report = judged.report
    for part in ("ranking", "calibration", "agreement", "length", "suites", "best_of_n", "verdicts"):
        assert report[part], part
    assert report["disagreement"] is None, "a single model has no members"
    about = report["about"]
    assert about["model"] == "demo_model" and about["version"] and about["input"] == "in.jsonl"
    assert (about["num_rows"], about["num_failed"], about["min_gap"], about["seed"]) == (24, 0, 0.3, 1)


def test_the_demo_model_knows_good_answers_from_spoilt_ones(judged):
    report = judged.report
    assert report["ranking"]["accuracy"]["value"] > 0.7
    assert set(report["ranking"]["by_domain"]) == {"answers", "pairs"}
    spillover = report["ranking"]["spillover"]
    assert spillover["in_domain"] == report["ranking"]["by_domain"]["answers"]
    assert report["agreement"]["spearman"]["value"] > 0.3
    suites = {each["name"]: each["untouched_wins"] for each in report["suites"]}
    assert suites["lazy"]["value"] > 0.9 and suites["truncated"]["value"] > 0.7
    assert {"verbosity", "sycophancy", "format", "hedging", "repetition", "off_topic", "shuffled"} < set(suites)
    best = report["best_of_n"]["curve"]
    assert len(best) == 5 and best[-1]["random"] < best[-1]["rating"] <= best[-1]["oracle"]


def test_accuracy_is_that_of_the_scores_in_the_file(judged):
    """Reckoned once more from scores.jsonl, by hand."""
    rows = [json.loads(line) for line in (judged.folder / "out" / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 48, "each prompt's own responses, and the spoilt ones"
    scored = [row["scores"] for row in sorted(rows, key=lambda row: len(row["scores"])) if len(row["scores"]) == 2]
    pairs = judged.report["ranking"]["by_domain"]["pairs"]
    assert len(scored) == 12 == pairs["num_pairs"]
    assert pairs["value"] == pytest.approx(sum(chosen > rejected for chosen, rejected in scored) / 12)


def test_the_page_has_every_picture_and_points_nowhere(judged):
    page = (judged.folder / "out" / "report.html").read_text()
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == page.count("<img") == 5
    assert not re.search(r"https?:|href=|<script|<link|@import|url\(", page)
    assert (judged.folder / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_calibration_is_one_that_can_be_read(judged):
    calibration, origin = calibration_file.read(judged.folder / "c.json")
    assert calibration.temperature == pytest.approx(judged.report["calibration"]["temperature"])
    assert (origin.model, origin.version) == ("demo_model", judged.report["about"]["version"])
    assert origin.num_pairs == judged.report["ranking"]["accuracy"]["num_pairs"]


def test_the_summary_is_short_and_names_the_findings(judged, capfd):
    again = [str(judged.source), f"--model={DEMO_MODEL}", *ARGUMENTS, f"--output={judged.folder / 'out'}"]
    assert eval_.run(again) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("demo_model ") and lines[0].endswith("prompts")
    assert len(lines) < 60 and max(map(len, lines)) <= 80
    findings = ("ranking accuracy", "calibration error", "Spearman", "untouched beats lazy", "best of 4", "usual bands")
    for finding in findings:
        assert finding in out, finding
    assert "scored 0 rows" in err and "48 rows in OUTPUT already" in err and "report.html" in err


def test_the_same_run_again_gives_the_same_figures(judged, tmp_path):
    arguments = [f"--model={DEMO_MODEL}", "--in-domain=answers", *ARGUMENTS, f"--output={tmp_path}"]
    assert eval_.run([str(judged.source), *arguments]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert {**again, "about": None} == {**judged.report, "about": None}


def test_a_compressed_file_is_the_same_and_suites_can_be_left_out(judged, tmp_path):
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(judged.source.read_bytes()))
    arguments = [f"--model={DEMO_MODEL}", "--no-suites", *ARGUMENTS, f"--output={tmp_path}"]
    assert eval_.run([str(packed), *arguments]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["suites"] == [] and len((tmp_path / "scores.jsonl").read_text().splitlines()) == 24
    assert report["ranking"]["accuracy"] == judged.report["ranking"]["accuracy"]
    assert report["about"]["input_sha256"] == judged.report["about"]["input_sha256"]


def test_what_is_judged_offline_is_what_the_model_gives_whatever_calibration_lies_beside_it(judged, tmp_path):
    """So that it can be fitted anew."""
    model = shutil.copytree(DEMO_MODEL, tmp_path / "demo_model")
    origin = calibration_file.Origin("demo_model", judged.report["about"]["version"], "pairs.jsonl", 10, 5)
    calibration_file.write(model / calibration_file.BESIDE, calibration_file.Temperature(4.0), origin)
    files = f"--output={tmp_path / 'out'}", f"--fit-calibration={tmp_path / 'c.json'}"
    assert eval_.run([str(judged.source), f"--model={model}", "--no-suites", *ARGUMENTS, *files]) == 0
    assert (tmp_path / "c.json").read_text() == (judged.folder / "c.json").read_text()


def test_a_calibration_of_pairs_that_are_the_wrong_way_round_is_doubted(tmp_path, capsys):
    pairs = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in demo_rows() if "chosen" in row]
    source, files = write(tmp_path / "in.jsonl", pairs[:4]), [f"--output={tmp_path}", f"--fit-calibration={tmp_path}/c"]
    assert eval_.run([str(source), f"--model={DEMO_MODEL}", "--no-suites", *ARGUMENTS[:1], *files]) == 0
    assert "0.0% of the pairs are ranked right: are chosen and rejected" in capsys.readouterr().err


def test_a_server_gives_the_figures_of_the_checkpoint(judged, tmp_path):
    with ServerProcess(f"demo={DEMO_MODEL}") as server:
        arguments = [f"--endpoint={server.endpoint}", "--in-domain=answers", "--seed=1", "--min-gap=0.3"]
        assert eval_.run([str(judged.source), *arguments, f"--output={tmp_path}"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["about"]["version"] == judged.report["about"]["version"] and report["about"]["model"] == "demo"
    assert report["ranking"] == judged.report["ranking"] and report["suites"] == judged.report["suites"]


def test_the_held_out_prompts_of_the_example_are_rows_of_ours(tmp_path):
    import demo_data
    from eval_data import rows
    from rewardserve.cli.eval_rows import read_judged

    prompts = [demo_data.CandidatePrompt("Why?", (demo_data.Answer("Because.", 0.9), demo_data.Answer("No.", 0.1)))]
    pairs = [demo_data.HarmlessPair([{"role": "user", "content": "Hi"}], "Hello.", "Go away.")]
    read, _ = read_judged(str(write(tmp_path / "in.jsonl", list(rows(demo_data.Split(prompts, pairs))))))
    found = [(each.domain, each.ratings, each.best) for each in read]
    assert found == [("helpful", (0.9, 0.1), 0), ("harmless", None, 0)]


def test_sources_that_the_repository_does_not_hold_are_asked_for(tmp_path) -> None:
    import demo_data

    with pytest.raises(SystemExit, match="not part of this repository"):
        demo_data.load_splits(tmp_path)


def test_a_label_below_one_half_turns_a_pair_round_and_one_half_is_no_pair(tmp_path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "label": label} for label in (1.0, 0.7, 0.5, 0.2)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged, _ = read_judged(str(tmp_path / "in.jsonl"))
    assert [each.responses for each in judged] == [("a", "b"), ("a", "b"), ("a", "b"), ("b", "a")]
    assert {each.ratings for each in judged} == {None}
    scored = [ScoredPrompt("p", "", (Scored(1.0, 1, 1), Scored(0.0, 1, 1)), each.gap) for each in judged]
    assert [len(pairs_of([each])) for each in scored] == [1, 1, 0, 1]


def test_a_tie_is_no_rating_and_leaves_best_of_n_to_what_was_rated(tmp_path, cli, server):
    rated = {"prompt": "p", "responses": ["a", "bb", "ccc"], "ratings": [3, 4, 5]}
    ties = [{"prompt": f"q{i}", "chosen": "a", "rejected": "bb", "label": 0.5} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rated, *ties)))
    flags = (server.endpoint, "--no-suites", "--output", tmp_path / "out")
    assert cli("eval", tmp_path / "in.jsonl", *flags).code == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["best_of_n"]
    assert [(each["n"], each["random"]) for each in found["curve"]] == [(1, 4.0), (2, 4.0), (3, 4.0)]
