"""Parts of the report that decide nothing: sensitivity, teachers, mechanism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .findings import units
from .mechanism import METHODS as WATCHED
from .mechanism import correlations
from .methods import CONTRASTS, METHODS
from .stages import best_of
from .statistics import Scores, t_interval
from .tables import around, difference, rows
from .tasks import PRIMARY_TASKS
from .teachers import TEACHERS

Table = dict[str, dict[str, Scores]]
Settings = dict[tuple[float, float], list[dict]]  # {(learning rate, the magnitudes' factor): runs}
PUBLISHED = {"full": -0.62, "lora": 0.83, "dora": -0.31}  # DoRA, arXiv 2402.09353: query matrices, four checkpoints
MAGNITUDES, LORAS_RATE = "own rate of magnitudes", "LoRA's learning rate"


def sensitivity(records: list[dict], table: Table, drawn: Sequence[str] = ()) -> str:
    """Each variant's difference to stage 2's runs of the same seeds, and the primary contrasts within it."""
    names = dict.fromkeys(r["variant"] for r in records if r["stage"] == "sensitivity")
    variants = {name: settings_of(records, name) for name in names}
    if not variants:
        return ""
    tasks = [task for task in PRIMARY_TASKS if any(task == t for cells in variants.values() for _, t in cells)]
    final = {(r["task"], r["method"], r["seed"]): r["test"] for r in records if r["stage"] == "stage2"}
    lines = []
    for variant, cells in variants.items():
        for method in [m for m in METHODS if any(m == name for name, _ in cells)]:
            factors = sorted({factor for (m, _), s in cells.items() if m == method for _, factor in s})
            for factor in factors:
                found = [best_runs(cells.get((method, task), {}), factor) for task in tasks]
                texts = [_beside_stage_2(runs, final) for runs in found]
                what = f"{variant}, × {factor:g}" if len(factors) > 1 else variant
                lines.append([what, METHODS[method].label, *texts])
    text = (
        "## Sensitivity (descriptive)\n\nTest score, and in brackets its difference to the same seeds of stage 2, 95 % "
        "(t, 8 seeds). Of several learning rates it is the one with the best validation score. Lines of × 1, and those "
        "at LoRA's learning rate where it is the method's own, repeat runs of stage 2: they show what rounding does "
        "to one seed's score when the same training runs in another batch.\n\n"
    )
    text += rows(["variant", "method", *tasks], lines, text=2)
    contrasts = [line for variant, cells in variants.items() for line in _contrasts(variant, cells, records, table)]
    if contrasts:
        text += (
            "\n\nThe primary contrasts within a variant, pooled over the encoder's tasks in stage 2's seed standard "
            "deviations, 95 % (t, 8 seeds; the choice of learning rates is not in it):\n\n"
        )
        text += rows(["variant", *(difference(pair) for pair in CONTRASTS)], contrasts)
    return text + _figures(
        {
            "magnitudes.png": "Magnitudes' own learning rate: what a factor changes (8 seeds, paired, 95 %).",
            "ranks.png": "Ranks: each at its best of three learning rates, beside LoRA of rank 4 (8 seeds, 95 %).",
        },
        drawn,
    )


def _figures(titles: Mapping[str, str], drawn: Sequence[str]) -> str:
    """Each figure that was drawn, and its title under it, to the colon of which it is called."""
    return "".join(
        f"\n\n![{title.partition(':')[0]}]({name})\n\n{title}" for name, title in titles.items() if name in drawn
    )


def settings_of(records: list[dict], variant: str) -> dict[tuple[str, str], Settings]:
    """{(method, task): settings} of one variant of the sensitivity runs."""
    found: dict[tuple[str, str], Settings] = {}
    for r in records:
        if (r["stage"], r["variant"]) == ("sensitivity", variant):
            settings = found.setdefault((r["method"], r["task"]), {})
            settings.setdefault((r["lr"], r["magnitude_factor"]), []).append(r)
    return found


def best_runs(settings: Settings, factor: float) -> list[dict]:
    """The runs at the learning rate with the best mean validation score, among those with this factor."""
    own = [runs for (_, by), runs in settings.items() if by == factor]
    return max(own, key=lambda runs: np.mean([r["validation"] for r in runs]), default=[])


def _beside_stage_2(runs: list[dict], final: dict[tuple[str, str, int], float]) -> str:
    if not runs:
        return ""
    pairs = [r["test"] - final[key] for r in runs if (key := (r["task"], r["method"], r["seed"])) in final]
    beside = f" ({around(*t_interval(pairs))})" if len(pairs) > 1 else ""
    return f"{np.mean([r['test'] for r in runs]):.2f}{beside}".replace("-", "−")


def _contrasts(
    variant: str, cells: dict[tuple[str, str], Settings], records: list[dict], table: Table
) -> list[list[str]]:
    """One line: the primary contrasts of a variant over the tasks in which both methods have it."""
    unit = units(table)
    if variant == MAGNITUDES:
        return []

    def runs(method: str, task: str) -> dict[int, float]:
        found = best_runs(cells.get((method, task), {}), 1.0)
        if not found and variant == LORAS_RATE:  # the method's own rate, so that stage 2 has its runs
            found = [r for r in records if (r["stage"], r["task"], r["method"]) == ("stage2", task, method)]
        return {r["seed"]: r["test"] for r in found}

    texts = []
    tasks = [task for task in unit if any(task == t for _, t in cells)]
    for a, b in CONTRASTS:
        both = [(task, runs(a, task), runs(b, task)) for task in tasks]
        seeds = set.intersection(*(set(x) & set(y) for _, x, y in both)) if both else set()
        pooled = [float(np.mean([(x[s] - y[s]) / unit[task] for task, x, y in both])) for s in sorted(seeds)]
        texts.append(around(*t_interval(pooled)) if len(pooled) > 1 else "")
    return [[variant, *texts]] if any(texts) else []


def teachers(records: list[dict], drawn: Sequence[str] = ()) -> str:
    """The best learning rate's mean share of the difference that was learned."""
    found = teacher_scores(records)
    methods = [m for m in METHODS if any(m in by for by in found.values())]
    lines = [
        [
            METHODS[m].label,
            *(f"{found[t][m][0]:.1f} ± {found[t][m][1]:.1f}" if m in found.get(t, {}) else "" for t in TEACHERS),
        ]
        for m in methods
    ]
    if not lines:
        return ""
    return (
        "## Teachers (descriptive)\n\nShare of a known difference between two weights that one layer learns, in "
        f"percent, 95 % (t, 8 seeds).\n\n{rows(['method', *TEACHERS], lines)}"
    ) + _figures({"teachers.png": "Teachers: what of each difference is learned."}, drawn)


def teacher_scores(records: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """{teacher: {method: (mean, half of its 95 % interval)}} at the best learning rate."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    runs: dict[tuple[str, str], list[dict]] = {}
    for r in records:
        if r["stage"] == "teachers":
            runs.setdefault((r["task"], r["method"]), []).append(r)
    for (teacher, method), own in runs.items():
        grid, best = best_of(own)
        found.setdefault(teacher, {})[method] = t_interval([r["test"] for r in own if r["lr"] == grid[best]])
    return found


def mechanism(records: list[dict], drawn: Sequence[str] = ()) -> str:
    """Correlations of ΔD and ΔM: by layers within a step or checkpoint, and DoRA's way; figures 2 and 3."""
    head: list[str] = []
    by_task: dict[str, list[list[str]]] = {}
    for method in WATCHED:
        own = [r for r in records if (r["stage"], r["method"]) == ("mechanism", method) and "steps" in r]
        tasks = [task for task in PRIMARY_TASKS if any(r["task"] == task for r in own)]
        found = {task: correlations([r for r in own if r["task"] == task]) for task in tasks}
        if len(tasks) > 1:
            pooled = {title: np.mean([by[title] for by in found.values()], 0) for title in found[tasks[0]]}
            found = {"mean of tasks": pooled} | found
        published = f"{PUBLISHED[method]:+.2f}".replace("-", "−") if method in PUBLISHED else ""
        for task, values in found.items():
            head = ["task", "method", *values, "published, DoRA"]
            cells = [around(*t_interval(v)) for v in values.values()]
            by_task.setdefault(task, []).append([task, METHODS[method].label, *cells, published])
    lines = [line for own in by_task.values() for line in own]
    if not lines:
        return ""
    text = (
        "## Mechanism: do directions and magnitudes change together? (descriptive)\n\nΔD is how far a layer's rows "
        "(or columns) turned, ΔM how much their lengths changed, each a mean over the layer's features. The table has "
        "their correlations over layers, 95 % (t, 4 seeds): of single steps (BoRA's figure 2), from W0 to a checkpoint "
        "(its figure 3), by output and by input feature. The last two columns are to be compared: the query matrices "
        "alone, by output feature, pooled over four checkpoints as in DoRA's figure 2, and what DoRA's paper (arXiv "
        "2402.09353) reports of a vision-language model. Pooled over checkpoints, a correlation shows for the most "
        f"part that both grow with the steps.\n\n{rows(head, lines, text=2)}"
    )
    return text + _figures(
        {
            "figure2.png": "Figure 2: what eight single steps change in each layer (a point; mean over seeds). r is "
            "the table's mean of tasks, over layers within a step; the whole cloud shows how the learning rate rises "
            "and falls. Upright bars: Adam's first step moves every magnitude by the learning rate.",
            "figure3.png": "Figure 3: how far each layer is from W0 at four checkpoints, likewise.",
        },
        drawn,
    )
