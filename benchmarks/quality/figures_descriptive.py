"""Figures of what decides nothing: magnitudes' own learning rate, ranks, teachers, mechanism. Need matplotlib."""

from __future__ import annotations

import numpy as np

from .descriptive import MAGNITUDES, best_runs, settings_of, teacher_scores
from .mechanism import METHODS as WATCHED
from .mechanism import changes, correlations
from .methods import METHODS
from .statistics import t_interval
from .tables import around
from .tasks import PRIMARY_TASKS, UNITS
from .teachers import TEACHERS

COLORS = {
    "bora": "#e4572e", "lora_r1": "#86b9e0", "dora": "#1b4f8f", "lora": "#4a90c2", "full": "#2e8b57",
    "dora_exact": "#6a4fb3", "bora_cr": "#f2a65a", "bora_detached": "#b5452c", "columns": "#c9a227",
    "scales": "#8c8c8c", "head": "#bbbbbb",
}  # fmt: skip
Lines = dict[tuple[str, str], dict[float, list[float]]]  # {(task, method): {x: paired differences}}
_AXES = {"row": "output features", "col": "input features"}
_MARKERS = ("o", "^", "s", "x")


def magnitudes(Figure, records: list[dict]):
    """The score over the factor of the magnitudes' learning rate, beside a factor of 1; None without runs."""
    lines: Lines = {}
    for (method, task), settings in settings_of(records, MAGNITUDES).items():
        by_factor = {factor: _by_seed(best_runs(settings, factor)) for factor in sorted({f for _, f in settings})}
        if 1.0 in by_factor:
            lines[task, method] = {factor: _beside(own, by_factor[1.0]) for factor, own in by_factor.items()}
    return _by_task(Figure, lines, "magnitudes' rate over the chosen one", "test score − that at a factor of 1")


def ranks(Figure, records: list[dict]):
    """The score over the rank, beside LoRA's in stage 2; None without runs."""
    lines: Lines = {}
    final: dict[tuple[str, str], list[dict]] = {}
    for r in records:
        if r["stage"] == "stage2":
            final.setdefault((r["task"], r["method"]), []).append(r)
    ranks = {r["rank"] for r in records if r["stage"] == "sensitivity" and r["variant"].startswith("rank ")}
    for rank in ranks:
        for (method, task), settings in settings_of(records, f"rank {rank}").items():
            if base := _by_seed(final.get((task, "lora"), [])):
                own = _by_seed(best_runs(settings, 1.0))
                line = lines.setdefault((task, method), {})
                line[rank] = _beside(own, base)
                if known := [r for r in final.get((task, method), []) if r["seed"] in own]:
                    line[known[0]["rank"]] = _beside(_by_seed(known), base)
    lines = {key: dict(sorted(line.items())) for key, line in lines.items()}
    return _by_task(Figure, lines, "rank r", "test score − LoRA's of rank 4")


def _by_seed(runs: list[dict]) -> dict[int, float]:
    return {r["seed"]: r["test"] for r in runs}


def _beside(own: dict[int, float], other: dict[int, float]) -> list[float]:
    """Paired differences over the seeds that both have."""
    return [own[seed] - other[seed] for seed in own if seed in other]


def _by_task(Figure, lines: Lines, label: str, y_label: str):
    """A panel for each task, a line for each method: mean differences with 95 % intervals over seeds."""
    tasks = [task for task in PRIMARY_TASKS if any(task == t for t, _ in lines)]
    if not tasks:
        return None
    figure = Figure(figsize=(3.4 * len(tasks), 3.2), layout="constrained")
    panels, drawn = figure.subplots(1, len(tasks), squeeze=False)[0], {}
    for panel, task in zip(panels, tasks, strict=True):
        methods = [method for method in METHODS if (task, method) in lines]
        for place, method in enumerate(methods):
            x = np.array(list(lines[task, method]), dtype=float)
            means, halves = np.array([t_interval(values) for values in lines[task, method].values()]).T
            beside = x * 1.05 ** (place - (len(methods) - 1) / 2)  # intervals side by side
            style = {"color": COLORS[method], "marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.4}
            drawn[method] = panel.errorbar(beside, means, np.nan_to_num(halves), **style)
            panel.set_xscale("log")
            panel.set_xticks(x, [f"{value:g}" for value in x])
        panel.axhline(0, color="black", linewidth=0.8)
        panel.minorticks_off()
        panel.tick_params(labelsize=8)
        panel.set_title(f"{task} ({UNITS.get(task, 'accuracy, %')})", fontsize=10)
        panel.set_xlabel(label, fontsize=9)
    panels[0].set_ylabel(y_label, fontsize=9)
    names = [method for method in METHODS if method in drawn]
    labels = [METHODS[method].label for method in names]
    figure.legend([drawn[m] for m in names], labels, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def teachers(Figure, records: list[dict]):
    """Bars: the share of a known difference that each method learns; None without runs."""
    found = teacher_scores(records)
    names = [name for name in TEACHERS if name in found]
    if not names:
        return None
    methods = [method for method in METHODS if any(method in found[name] for name in names)]
    figure = Figure(figsize=(2.4 * len(names) + 1, 3.2), layout="constrained")
    panel, width = figure.subplots(), 0.85 / len(methods)
    for place, method in enumerate(methods):
        means, halves = np.array([found[name].get(method, (np.nan, np.nan)) for name in names]).T
        x = np.arange(len(names)) + (place - (len(methods) - 1) / 2) * width
        panel.bar(x, means, width, yerr=np.nan_to_num(halves), color=COLORS[method], label=METHODS[method].label)
    panel.set_xticks(range(len(names)), [f"{name}\n{TEACHERS[name]}" for name in names], fontsize=8)
    panel.set_ylabel("share of the difference learned, %")
    panel.set_ylim(0, 102)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    return figure


def mechanism(Figure, runs: list[dict], key: str):
    """ΔD against ΔM: a point for each layer and step, the mean over seeds; a column for each method."""
    tasks = [task for task in PRIMARY_TASKS if any(r["task"] == task for r in runs)]
    methods = [method for method in WATCHED if any(r["method"] == method for r in runs)]
    figure = Figure(figsize=(2.9 * len(methods), 5.4), layout="constrained")
    panels = figure.subplots(len(_AXES), len(methods), squeeze=False, sharex=True, sharey=True)
    title = "from W0" if key == "starts" else "step"
    for line, (axis, label) in zip(panels, _AXES.items(), strict=True):
        for panel, method in zip(line, methods, strict=True):
            seeds: dict[int, list[float]] = {}
            for marker, task in zip(_MARKERS, tasks, strict=False):
                own = [r for r in runs if (r["task"], r["method"]) == (task, method)]
                points = [[_moved(c, axis) for c in changes(r[key])] for r in own]
                steps = [c.step or 0 for c in changes(own[0][key])] if own else []
                if own:
                    moved = np.mean(points, 0)
                    scatter = panel.scatter(*moved.T, c=steps, s=7, marker=marker, linewidths=0, alpha=0.7)
                for r in own:
                    found = correlations([r])[f"{title}, by {'output' if axis == 'row' else 'input'}"]
                    seeds.setdefault(r["seed"], []).extend(found)
            mean, half = t_interval([float(np.mean(values)) for values in seeds.values()])
            panel.set_title(f"{METHODS[method].label}, {label}\nr = {around(mean, half)}", fontsize=8)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.tick_params(labelsize=7)
        line[0].set_ylabel("ΔD, change of direction", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("ΔM, change of magnitude", fontsize=8)
    bar = figure.colorbar(scatter, ax=panels, aspect=40, ticks=sorted(set(steps)))
    bar.solids.set_alpha(1)
    bar.set_label("step", size=8)
    bar.ax.tick_params(labelsize=7)
    shapes = {"o": "circles", "^": "triangles", "s": "squares", "x": "crosses"}
    figure.suptitle(", ".join(f"{shapes[m]}: {task}" for m, task in zip(_MARKERS, tasks, strict=False)), fontsize=8)
    return figure


def _moved(change, axis: str) -> tuple[float, float]:
    return getattr(change, f"magnitude_{axis}"), getattr(change, f"direction_{axis}")
