"""The report's figures. Needs matplotlib; without it the report has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .findings import SMALLEST
from .mechanism import METHODS as WATCHED
from .mechanism import changes
from .methods import METHODS, PRIMARY
from .statistics import Contrast, Scores
from .tasks import PRIMARY_TASKS

_COLORS = {
    "bora": "#e4572e", "lora_r1": "#86b9e0", "dora": "#1b4f8f", "lora": "#4a90c2", "full": "#2e8b57",
    "dora_exact": "#6a4fb3", "bora_cr": "#f2a65a", "bora_detached": "#b5452c", "columns": "#c9a227",
    "scales": "#8c8c8c", "head": "#bbbbbb",
}  # fmt: skip
_AXES = {"row": "output feature", "col": "input feature"}


def draw(
    folder: Path,
    records: list[dict],
    table: Mapping[str, Mapping[str, Scores]],
    found: Mapping[tuple[str, str], Contrast],
) -> list[Path]:
    """Write the figures for which there are runs; returns their paths."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    drawn = []

    def save(figure: Figure, name: str) -> None:
        drawn.append(folder / name)
        figure.savefig(drawn[-1], dpi=130)

    if found:
        save(_contrasts(Figure, found), "contrasts.png")
    if tasks := [task for task in PRIMARY_TASKS if task in table]:
        save(_rates(Figure, table, tasks), "learning_rates.png")
    for key, name in (("steps", "figure2.png"), ("starts", "figure3.png")):
        runs = [r for r in records if r["stage"] == "mechanism" and key in r]
        if runs:
            save(_mechanism(Figure, runs, key), name)
    return drawn


def _contrasts(Figure, found: Mapping[tuple[str, str], Contrast]):
    """Estimates and intervals, pooled and by task, of each primary contrast."""
    figure = Figure(figsize=(4.6 * len(found), 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharex=True)[0]
    for panel, ((a, b), contrast) in zip(panels, found.items(), strict=True):
        rows = [("pooled", contrast.estimate, contrast.low, contrast.high)]
        rows += [(task, *values) for task, values in contrast.tasks.items()]
        for place, (_, estimate, low, high) in enumerate(reversed(rows)):
            pooled = place == len(rows) - 1
            panel.plot(
                [low, high], [place] * 2, color=_COLORS[a] if pooled else "#999999", linewidth=3 if pooled else 1.5
            )
            panel.plot(estimate, place, "o", color=_COLORS[a] if pooled else "#666666")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.axvline(SMALLEST, color="black", linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
        panel.set(title=f"{METHODS[a].label} − {METHODS[b].label}", xlabel="seed standard deviations")
    return figure


def _rates(Figure, table: Mapping[str, Mapping[str, Scores]], tasks: list[str]):
    """Stage 1: mean validation score over the learning rate, the chosen one marked."""
    figure = Figure(figsize=(3.6 * len(tasks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for method, scores in table[task].items():
            means = scores.validation.mean(1)
            width = 2.2 if method in PRIMARY else 1
            panel.plot(scores.rates, means, color=_COLORS[method], linewidth=width, label=METHODS[method].label)
            panel.plot(scores.rates[scores.chosen], means[scores.chosen], "o", color=_COLORS[method])
        best = max(scores.validation.mean(1).max() for scores in table[task].values())
        spread = best - np.median([scores.validation.mean(1).max() for scores in table[task].values()])
        panel.set(xscale="log", title=task, xlabel="learning rate", ylim=(best - max(4 * spread, 1), None))
    panels[0].set_ylabel("validation score")
    panels[-1].legend(fontsize=6)
    return figure


def _mechanism(Figure, runs: list[dict], key: str):
    """ΔD against ΔM, a point for each layer, step and seed, coloured by step; a column for each method."""
    tasks = [task for task in PRIMARY_TASKS if any(r["task"] == task for r in runs)]
    methods = [method for method in WATCHED if any(r["method"] == method for r in runs)]
    lines = [(task, axis) for task in tasks for axis in _AXES]
    figure = Figure(figsize=(3 * len(methods), 2.5 * len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), len(methods), squeeze=False)
    for line, (task, axis) in zip(panels, lines, strict=True):
        for panel, method in zip(line, methods, strict=True):
            points = [c for r in runs if (r["task"], r["method"]) == (task, method) for c in changes(r[key])]
            moved = [[getattr(c, f"{kind}_{axis}") for c in points] for kind in ("magnitude", "direction")]
            panel.scatter(*moved, c=[c.step for c in points], s=3)
            panel.ticklabel_format(style="sci", scilimits=(0, 0))
            panel.tick_params(labelsize=6)
            panel.set_title(f"{METHODS[method].label}, {task}, by {_AXES[axis]}", fontsize=7)
        line[0].set_ylabel("ΔD")
    for panel in panels[-1]:
        panel.set_xlabel("ΔM")
    return figure
