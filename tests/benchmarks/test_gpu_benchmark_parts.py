"""What bench-gpu measures with: the gate sees what is wrong, limits are what they are said to be, fallbacks fail."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of benchmarks/gpu, by its name; they are not a package, and leave no trace."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def part_of(gpu: Callable[[str], Any], folder: Path, **others: Any) -> Any:
    """On a CPU, `others` being what other parts have found."""
    part = gpu("part")
    for name, found in others.items():
        part.Part(name, folder, "cpu", tiny=True).note(**found)
    return part.Part("this", folder, "cpu", tiny=True)


@pytest.mark.parametrize("option", ["window", "softcap", "sinks"])
def test_a_kernel_that_ignores_an_option_is_seen(option: str, gpu, tmp_path: Path, monkeypatch) -> None:
    checks, cases, part = gpu("kernel_checks"), gpu("attention_case"), part_of(gpu, tmp_path)
    kernel = cases.attention_kernel(part)

    def plan(segments: Any, dtype: Any, device: Any, window: int, last: bool) -> Any:
        return kernel.plan_attention(segments, dtype, device, 0 if option == "window" else window, last)

    def attend(*args: Any, **options: Any) -> torch.Tensor:
        return kernel.tree_attention(*args, **{**options, option: None if option == "sinks" else 0.0})

    ignoring = SimpleNamespace(plan_attention=plan, tree_attention=kernel.tree_attention)
    if option != "window":
        ignoring.tree_attention = attend
    (case,) = (c for c in checks.CASES if str(c) == f"128/128, 8/2 heads, {option}")
    for part.tiny in (True, False):
        assert checks.attention_is_right(part, case)[0]
        with monkeypatch.context() as patched:
            patched.setattr(cases, "attention_kernel", lambda part: ignoring)
            assert not checks.attention_is_right(part, case)[0]


@pytest.mark.parametrize("wrong", ["norm", "centre", "bias of the norm", "plus_one", "last"])
def test_a_pooling_that_is_wrong_is_seen(wrong: str, gpu, tmp_path: Path, monkeypatch) -> None:
    from dataclasses import replace

    checks, part = gpu("kernel_checks"), part_of(gpu, tmp_path)
    pooled = checks.pool_kernel(part)

    def other(hidden: Any, spans: Any, weight: Any, bias: Any, norm: Any, pooling: Any) -> torch.Tensor:
        if norm is not None:
            changes = {"plus_one": {"plus_one": False}, "bias of the norm": {"bias": None}}.get(wrong, {})
            if wrong == "centre":
                changes = {"kind": checks.NormKind.RMS, "bias": None}
            norm = None if wrong == "norm" else replace(norm, **changes)
        if wrong == "last":
            pooling = checks.Pooling.MEAN
        return pooled(hidden, spans, weight, bias, norm, pooling)

    ways = checks.pooled_ways(part).values()
    assert all(checks.pool_head_is_right(part, *way)[0] for way in ways)
    monkeypatch.setattr(checks, "pool_kernel", lambda part: other)
    assert not all(checks.pool_head_is_right(part, *way)[0] for way in ways)


def test_each_kernel_to_compile_has_a_name_of_its_own(gpu, tmp_path: Path) -> None:
    part = part_of(gpu, tmp_path)
    part.tiny = False
    cases = {*gpu("kernel_checks").CASES, *gpu("kernel_figures").cases(part)}
    assert len({str(case) for case in cases}) == len(cases) == 12


def test_a_check_that_raises_is_red_and_says_where(gpu, tmp_path: Path) -> None:
    part = part_of(gpu, tmp_path)
    check = gpu("checks").Checks(part)
    check("that one", lambda: 1 / 0)
    outcome = part.of("this")["checks"]["that one"]
    assert not outcome["ok"] and outcome["detail"] == "ZeroDivisionError: division by zero"
    assert "line" in outcome["traceback"] and "1 / 0" in outcome["traceback"]


def test_limits_are_the_least_work_at_the_rates_they_are_of(gpu, tmp_path: Path) -> None:
    """On the shape of the predictions: 2,782 pairs/s at 790 TFLOP/s; in fp8 all layers but two at its rate."""
    limits, work, random_model = gpu("limits"), gpu("work"), gpu("random_model")
    part = part_of(gpu, tmp_path, machine={"gemm_tflops": 790.0, "gemm_fp8_tflops": 1500.0})
    for name, bf16, fp8 in (("qwen3-0.6b", 2782, 4715), ("llama-3.1-8b", 198, 369)):
        random_model._config(name, 32_000).save_pretrained(tmp_path / name)
        shape = work.ModelShape.of(tmp_path / name)
        least = work.shared([[*range(512), *range(1000 * i + 600, 1000 * i + 856)] for i in range(16)])
        rates = limits.machine_rates(part, shape)
        assert rates.least_seconds(shape, least) == pytest.approx(work.least_seconds(shape, least, rates.bf16))
        assert 16 / rates.least_seconds(shape, least) == pytest.approx(bf16, rel=0.01)
        in_fp8 = limits.machine_rates(part, shape, fp8=True)
        assert 16 / in_fp8.least_seconds(shape, least) == pytest.approx(fp8, rel=0.06)


def test_there_is_no_share_of_a_machine_that_nobody_measured(gpu, tmp_path: Path) -> None:
    shape = gpu("work").ModelShape(64, 3, 4, 2, 16, 160)
    with pytest.raises(RuntimeError, match="rates are not known"):
        gpu("limits").machine_rates(part_of(gpu, tmp_path), shape)


def test_a_fallback_is_not_measured_as_ours(gpu, tmp_path: Path) -> None:
    served = gpu("served")
    part = gpu("part").Part("this", tmp_path, "cuda", tiny=True)
    options = served.NativeOptions("", device="cuda")
    rooms = {kind: f"rewardserve_kernels.{room}.triton" for kind, room in served.ROOMS.items()}
    ours = {"path": "packed", **rooms, "compiled": True, "graphs": 4, "parameters": 600_000_000}
    served.require_meant(part, options, ours)
    served.require_meant(part, options, {**ours, "graphs": 0, "parameters": 8_000_000_000})
    fallbacks = {"path": "padded", "attention": "rewardserve_kernels.attention.chunked", "compiled": False, "graphs": 0}
    for kind, how in {**fallbacks, "storing": "rewardserve_kernels.kv_cache.paged", "pooling": "none"}.items():
        with pytest.raises(RuntimeError, match=f"not run as meant: .*{kind}"):
            served.require_meant(part, options, {**ours, kind: how})


def test_scores_of_other_pairs_are_not_compared(gpu) -> None:
    errors = gpu("score_errors")
    same = errors.compare([[1.0, 2.0], [3.0, 5.0]], [[2.5, 2.0], [3.0, 5.0]])
    assert (same["pairs"], same["mean_abs_err"], same["max_abs_err"]) == (4, 0.375, 1.5)
    assert same["flipped_within_a_prompt"] == "50.00% of 2" and same["other_best_answer"] == "50.00% of 2 prompts"
    with pytest.raises(ValueError, match="other pairs"):
        errors.compare([[1.0, 2.0]], [[1.0], [2.0]])


def test_the_prompts_of_the_demo_are_what_its_template_makes_of_them(gpu) -> None:
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "demo_model")
    rows = [json.loads(line) for line in (ROOT / "examples" / "demo.jsonl").read_text().splitlines()]
    for row, (prompt, answers) in zip(rows, gpu("score_errors").demo_groups(), strict=True):
        for response, ids in zip(row["responses"], answers, strict=True):
            conversation = [*row["messages"], {"role": "assistant", "content": response}]
            assert tokenizer.apply_chat_template(conversation)["input_ids"] == prompt + ids


def test_the_plan_fits_its_ten_minutes_as_expected() -> None:
    program = "import plan; print(sum(max(part.expected_s for part in stage) for stage in plan.STAGES))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks" / "gpu", capture_output=True, text=True, check=True
    )
    assert float(done.stdout) <= 570
