"""The report's figures. Needs matplotlib; without it the report has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .figures_descriptive import COLORS, magnitudes, mechanism, ranks, teachers
from .findings import SMALLEST
from .methods import METHODS, PRIMARY
from .statistics import Contrast, Scores
from .tables import difference
from .tasks import PRIMARY_TASKS, UNITS


def draw(
    folder: Path,
    records: list[dict],
    table: Mapping[str, Mapping[str, Scores]],
    found: Mapping[tuple[str, str], Contrast],
    others: Mapping[tuple[str, str], Contrast],
) -> list[Path]:
    """Write the figures for which there are runs; returns their paths.

    ``found`` are the primary contrasts, ``others`` the rest of them.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    drawn = []

    def save(figure: Figure, name: str) -> None:
        drawn.append(folder / name)
        figure.savefig(drawn[-1], dpi=110)

    if found:
        save(_contrasts(Figure, found), "contrasts.png")
    if tasks := [t for t in PRIMARY_TASKS if any(METHODS[method].is_adapter for method in table.get(t, {}))]:
        save(_rates(Figure, table, tasks), "learning_rates.png")
    if others:
        save(_others(Figure, others), "others.png")
    for make in (magnitudes, ranks, teachers):
        if (figure := make(Figure, records)) is not None:
            save(figure, f"{make.__name__}.png")
    for key, name in (("steps", "figure2.png"), ("starts", "figure3.png")):
        runs = [r for r in records if r["stage"] == "mechanism" and key in r]
        if runs:
            save(mechanism(Figure, runs, key), name)
    return drawn


def _contrasts(Figure, found: Mapping[tuple[str, str], Contrast]):
    """Estimates and intervals, pooled and by task, of each primary contrast."""
    figure = Figure(figsize=(4.8 * len(found), 3.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharex=True, sharey=True)[0]
    for panel, ((a, b), contrast) in zip(panels, found.items(), strict=True):
        lines = [("pooled", contrast.estimate, contrast.low, contrast.high)]
        lines += [(task, *values) for task, values in contrast.tasks.items()]
        for place, (_, estimate, low, high) in enumerate(reversed(lines)):
            pooled = place == len(lines) - 1
            color, width = (COLORS[a], 3.0) if pooled else ("#777777", 1.5)
            panel.plot([low, high], [place] * 2, color=color, linewidth=width, solid_capstyle="butt")
            panel.plot(estimate, place, "o", color=color, markersize=8 if pooled else 6)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.axvline(SMALLEST, color="black", linewidth=0.8, linestyle=":")
        panel.annotate(f"{SMALLEST}", (SMALLEST, -0.5), (2, 2), textcoords="offset points", fontsize=8)
        panel.set_yticks(range(len(lines)), [name for name, *_ in reversed(lines)])
        panel.set_ylim(-0.5, len(lines) - 0.5)
        title = difference((a, b))
        panel.set_title(f"{title}, pooled at {100 * contrast.level:g} %", fontsize=10)
        panel.set_xlabel(
            f"← {METHODS[b].label.split(',')[0].split(' (')[0]} better    seed SDs    {METHODS[a].label} better →"
        )
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _rates(Figure, table: Mapping[str, Mapping[str, Scores]], tasks: list[str]):
    """Stage 1: mean validation score of the adapters over the learning rate, the chosen one marked.

    The lowest quarter of a panel's scores, where learning has failed or hardly begun, is cut off.
    """
    figure = Figure(figsize=(3.4 * len(tasks), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    lines = {}
    for panel, task in zip(panels, tasks, strict=True):
        adapters = {method: scores for method, scores in table[task].items() if METHODS[method].is_adapter}
        for method, scores in adapters.items():
            means = scores.validation.mean(1)
            width = 2.2 if method in PRIMARY else 1
            style = {"color": COLORS[method], "linewidth": width, "zorder": 3 if method in PRIMARY else 2}
            (lines[method],) = panel.plot(scores.rates, means, marker=".", **style)
            panel.plot(scores.rates[scores.chosen], means[scores.chosen], "o", **style)
        means = np.concatenate([scores.validation.mean(1) for scores in adapters.values()])
        low, high = np.percentile(means, 25), means.max()
        panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        grid = sorted({rate for scores in adapters.values() for rate in scores.rates})
        panel.set_xscale("log")
        panel.set_xticks(grid[:: max(1, len(grid) // 5)], [f"{rate:g}" for rate in grid[:: max(1, len(grid) // 5)]])
        panel.minorticks_off()
        panel.tick_params(labelsize=7)
        panel.set(title=f"{task} ({UNITS.get(task, 'accuracy, %')})", xlabel="learning rate")
        panel.title.set_fontsize(10)
    panels[0].set_ylabel("validation score, mean of seeds")
    names = [method for method in METHODS if method in lines]
    figure.legend(
        [lines[m] for m in names], [METHODS[m].label for m in names], loc="outside lower center", ncols=6, fontsize=8
    )
    return figure


def _others(Figure, found: Mapping[tuple[str, str], Contrast]):
    """The other contrasts' estimates and intervals."""
    figure = Figure(figsize=(6.4, 0.7 + 0.32 * len(found)), layout="constrained")
    panel = figure.subplots()
    pairs = list(found)[::-1]
    for place, pair in enumerate(pairs):
        contrast, (a, _) = found[pair], pair
        panel.plot([contrast.low, contrast.high], [place] * 2, color=COLORS[a], linewidth=2, solid_capstyle="butt")
        panel.plot(contrast.estimate, place, "o", color=COLORS[a])
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(found)), [difference(pair) for pair in pairs], fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlabel("pooled difference in seed standard deviations, 95 %", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    return figure
