"""A result as a picture: share of the limit, workload by workload, and Hugging Face's beside it."""

from pathlib import Path
from typing import Any

OURS, PEER, GOAL = "#1f6feb", "#9aa4b2", "#b3261e"


def draw(whole: dict[str, Any], file: Path) -> str:
    """What is to be said of it: where it is, or why it is not there."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed here; where it is, run.py --draw FILE.json makes it"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = list(_bars(whole["parts"]))
    if not bars:
        return "no picture: nothing was measured that it would show"
    figure, axes = plt.subplots(figsize=(2 + 1.0 * len(bars), 4.5), layout="constrained")
    for place, (_, share, color) in enumerate(bars):
        axes.bar(place, 100 * share, color=color)
        axes.annotate(f"{share:.0%}", (place, 100 * share), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(bars)), [name for name, *_ in bars], fontsize=6)
    axes.axhline(100, color=GOAL, linewidth=1)
    axes.set_ylabel("% of the least work at the rate of one great product")
    axes.set_title(f"{whole['parts'].get('machine', {}).get('name', '')}: rewardserve (blue), Hugging Face (grey)")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return f"drawn to {file}"


def _bars(parts: dict[str, Any]) -> Any:
    """Name, share and color, model by model; Hugging Face where it is most ahead: sorted by length."""
    plain = parts.get("hugging face", {}).get("hugging_face", {})
    for part, result in parts.items():
        for workload, entry in result.get("workloads", {}).items():
            yield f"{part}\n{workload}", entry["share_of_limit"], OURS
            peer = plain.get(part, {}).get(f"{workload}, sorted")
            if peer is not None:
                yield f"HF {part}\n{workload}", peer["share_of_limit"], PEER
