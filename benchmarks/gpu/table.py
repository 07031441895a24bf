"""A run's results for people, and the verdict on them."""

from collections.abc import Iterator
from typing import Any

from plan import GATE

Results = dict[str, dict[str, Any]]
CEILINGS = ("copy_gb_per_s", "gemm_tflops", "gemm_fp8_tflops")
WIDTH = 110


def red(results: Results) -> dict[str, str]:
    """What the gate found wrong, or did not come to, with what is to be said of it."""
    found: dict[str, str] = {}
    for name in GATE:
        gate = results.get(name)
        if gate is None:
            found[name] = "it was not run"
            continue
        found |= {check: each["detail"] for check, each in gate.get("checks", {}).items() if not each["ok"]}
        if "failed" in gate:
            found[name] = f"it did not come to its end: {gate['failed']}"
    return found


def failed(results: Results) -> list[str]:
    return [name for name, result in results.items() if "failed" in result]


def table(results: Results, whole_gate: bool = True) -> str:
    """`whole_gate`: a gate that was not run is red."""
    lines = ["", "=" * WIDTH, *_machine(results.get("machine", {})), *_gate(results, whole_gate)]
    lines += [*_kernels(results.get("kernels", {})), *_tunings(results.get("tunings", {}))]
    for name, result in results.items():
        lines += _workloads(name, result)
        lines += [f"  {name:14} {key}: {value}" for key, value in result.get("more", {}).items()]
    lines += _hugging_face(results.get("hugging face", {}))
    for name, result in results.items():
        if "ended" in result:
            lines.append(f"  {name:14} ended early: {result['ended']}")
        if "failed" in result:
            lines.append(f"  {name:14} FAILED: {result['failed'].strip().splitlines()[-1][:160]}")
    return "\n".join([*lines, "=" * WIDTH])


def _machine(machine: dict[str, Any]) -> Iterator[str]:
    versions = "  ".join(f"{key} {machine.get(key)}" for key in ("torch", "triton", "driver", "cuda"))
    yield f"{machine.get('name', 'unknown GPU')}  {versions}"
    yield from (f"  {key:18} {machine[key]:.0f}" for key in CEILINGS if key in machine)


def _gate(results: Results, whole_gate: bool) -> Iterator[str]:
    checks = {name: each for gate in GATE for name, each in results.get(gate, {}).get("checks", {}).items()}
    wrong = {name: why for name, why in red(results).items() if whole_gate or name not in GATE or name in results}
    verdict = ", RED: figures are no claims" if wrong else ""
    yield f"gate: {sum(check['ok'] for check in checks.values())} of {len(checks)} green{verdict}"
    yield from (f"  RED {name}: {why}" for name, why in wrong.items())


def _share(value: float | None, of: str) -> str:
    return f"{value:6.1%} of {of}" if value else ""


def _kernels(kernels: dict[str, Any]) -> Iterator[str]:
    for name, entry in kernels.get("attention", {}).items():
        share, flash = _share(entry["share_of_gemm"], "the product's rate"), entry["flash_tflops"]
        yield f"  attention {name:32} {entry['tflops']:6.0f} TFLOP/s {share}; torch's flash, no prefix: {flash:.0f}"
    for kind in ("pool_head", "storing", "sums"):
        for name, entry in kernels.get(kind, {}).items():
            rates = f"{entry['us']:8.1f} us {entry['gb_per_s']:6.0f} GB/s {_share(entry['share_of_copy'], 'a copy')}"
            yield f"  {kind:10}{name:30} {rates}"


def _tunings(tunings: dict[str, Any]) -> Iterator[str]:
    for shape, entry in tunings.get("tunings", {}).items():
        if best := entry.get("best"):
            verdict = "right" if best["right"] else f"WRONG: {best['detail']}"
            yield f"  tunings of {shape:12} best {best['tflops']:.0f} TFLOP/s with {best['tuning']}, {verdict}"


def _workloads(name: str, result: dict[str, Any]) -> Iterator[str]:
    for workload, entry in result.get("workloads", {}).items():
        rates = f"{entry['pairs_per_s']:8.0f} pairs/s {entry['tokens_per_s'] / 1e3:7.0f}k tokens/s"
        shares = f"{entry['share_of_limit']:6.1%} of the limit, {entry['share_of_products']:6.1%} of its own products'"
        yield f"  {name:14} {workload:14} {rates} {shares}"


def _hugging_face(result: dict[str, Any]) -> Iterator[str]:
    for model, found in result.get("hugging_face", {}).items():
        for what, entry in found.items():
            if isinstance(entry, dict):
                figures = f"{entry['pairs_per_s']:8.1f} pairs/s {entry['share_of_limit']:6.1%} of the limit"
                yield f"  hugging face   {model:14} {what:30} {figures}"
            else:
                yield f"  hugging face   {model:14} {entry}"
