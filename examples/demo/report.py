"""What the demo tells: the table, the loss curves and the JSON file."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_Z = statistics.NormalDist().inv_cdf(0.975)  # 95 %
# The adapters' curves all but coincide: from wide to narrow, each lies visibly on the one before.
_LINES: dict[str, dict[str, Any]] = {
    "head": {"color": "#7f7f7f", "linewidth": 1.6},
    "lora": {"color": "#86b9e0", "linewidth": 6.0},
    "dora": {"color": "#1b4f8f", "linewidth": 3.0, "linestyle": (0, (2.5, 1.5))},
    "bora": {"color": "#e4572e", "linewidth": 1.4},
    "full": {"color": "#2e8b57", "linewidth": 1.6},
}
_LABELS = {"head": "head only", "lora": "LoRA", "dora": "DoRA", "bora": "BoRA", "full": "full"}
_SMOOTHING = 0.9  # share of the past in the moving average of a loss curve


@dataclass(frozen=True)
class MethodResult:
    """One method, over all seeds."""

    method: str
    learning_rate: float
    trained_parameters: int
    step_memory_bytes: int
    step_ms: float  # median over all steps of all seeds
    accuracies: list[float]  # one for each seed
    correct: list[list[bool]]  # [seeds][examples]
    losses: list[list[float]]  # [seeds][steps]


def wilson_interval(accuracy: float, examples: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (E. B. Wilson, 1927)."""
    if examples < 1 or not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"accuracy must be in [0, 1] of at least 1 example, got {accuracy} of {examples}")
    shrink = 1 + _Z**2 / examples
    center = (accuracy + _Z**2 / (2 * examples)) / shrink
    half = _Z / shrink * math.sqrt(accuracy * (1 - accuracy) / examples + _Z**2 / (4 * examples**2))
    return max(0.0, center - half), min(1.0, center + half)


def paired_difference(first: list[list[bool]], second: list[list[bool]]) -> tuple[float, float]:
    """Accuracy of ``first`` less that of ``second`` on the same examples, and its 95 % interval's half-width.

    Both get most of the same examples right, so the difference is known far better than either accuracy.
    """
    means = [[sum(seeds) / len(seeds) for seeds in zip(*correct, strict=True)] for correct in (first, second)]
    differences = [a - b for a, b in zip(*means, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), _Z * spread / math.sqrt(len(differences))


def format_table(results: list[MethodResult], memory_measure: str) -> str:
    """The table, its notes, and the differences to BoRA where BoRA is among the methods."""
    seeds, examples = len(results[0].accuracies), len(results[0].correct[0])
    header = ["method", "accuracy % (95 % interval)", "trained parameters", "ms/step", "peak MiB", "learning rate"]
    if seeds > 1:
        header.insert(2, "± over seeds")
    rows = [header]
    for result in results:
        mean = statistics.fmean(result.accuracies)
        low, high = wilson_interval(mean, examples)
        row = [
            _LABELS[result.method],
            f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{result.trained_parameters:,}",
            f"{result.step_ms:.0f}",
            f"{result.step_memory_bytes / 2**20:.0f}",
            f"{result.learning_rate:g}",
        ]
        if seeds > 1:
            row.insert(2, f"{100 * statistics.stdev(result.accuracies):.1f}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    lines.insert(1, "-" * len(lines[0]))
    runs = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    lines.append(f"\n{examples:,} examples, {runs}; Wilson intervals. ms/step: median. peak MiB: {memory_measure}.")
    return "\n".join(lines + _difference_lines(results))


def _difference_lines(results: list[MethodResult]) -> list[str]:
    bora = next((result for result in results if result.method == "bora"), None)
    if bora is None or len(results) == 1:
        return []
    parts = []
    for result in results:
        if result is not bora:
            difference, half = paired_difference(bora.correct, result.correct)
            parts.append(f"{100 * difference:+.1f} ± {100 * half:.1f} to {_LABELS[result.method]}")
    return ["BoRA's difference in points, on the same test examples (95 %): " + ", ".join(parts) + "."]


def write_json(path: Path, results: list[MethodResult], **details: object) -> None:
    """All figures of the run, with the intervals; ``details`` says what was run."""
    methods = []
    for result in results:
        entry = asdict(result)
        examples = len(entry.pop("correct")[0])
        mean = statistics.fmean(result.accuracies)
        entry |= {"accuracy": mean, "accuracy_95": wilson_interval(mean, examples), "test_examples": examples}
        methods.append(entry)
    path.write_text(json.dumps({**details, "methods": methods}, indent=1, default=str) + "\n", encoding="utf-8")


def plot_losses(path: Path, results: list[MethodResult], title: str) -> None:
    """Training loss of all methods in one figure: mean over the seeds, as a moving average."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        losses = [statistics.fmean(step) for step in zip(*result.losses, strict=True)]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, smooth(losses), label=_LABELS[result.method], **_LINES[result.method])
    axes.set(xlabel="step", ylabel="training loss (moving average)", title=title)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average without the pull of a starting value: always a mean of the values so far."""
    total = weight = 0.0
    averages = []
    for value in values:
        total = _SMOOTHING * total + value
        weight = _SMOOTHING * weight + 1.0
        averages.append(total / weight)
    return averages
