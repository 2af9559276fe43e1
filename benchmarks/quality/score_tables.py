"""The report's tables of methods, their learning rates and their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .findings import at_edge
from .methods import METHODS, PRIMARY
from .statistics import Scores, choices, t_interval
from .tables import around, rows, scientific
from .tasks import PRIMARY_TASKS, SECONDARY_TASKS, UNITS

Table = dict[str, dict[str, Scores]]
_FAR = 5


def methods(records: list[dict], table: Table, drawn: Sequence[str]) -> str:
    """What each method trains, and the chosen rates side by side."""
    tasks = [task for task in (*PRIMARY_TASKS, *SECONDARY_TASKS) if task in table]
    names = [method for method in METHODS if any(method in table[task] for task in tasks)]
    if not tasks:
        return ""
    counts = {(r["task"], r["method"]): r.get("parameters") for r in records if r["stage"] == "stage2"}

    def trained(task: str, method: str) -> str:
        count = counts.get((task, method))
        return f"{count:,}" if count else ""

    def cell(task: str, method: str) -> str:
        if method not in table[task]:
            return ""
        s = table[task][method]
        rate = s.rates[s.chosen]
        return f"{scientific(rate)}{' (edge)' if at_edge(s) else ''}, {100 * choices(s).get(rate, 0.0):.0f} %"

    lines = [
        [METHODS[m].label, trained("movies", m), trained("bbc_lm", m), *(cell(task, m) for task in tasks)]
        for m in names
    ]
    text = (
        "## Methods and their learning rates\n\nTrained parameters (of MiniLM with its head, on movies); the learning "
        "rate that stage 1 chose, and in which share of all resamples of its seeds the same one wins. (edge): the best "
        "lies at the edge of a grid that was widened as far as the plan allows.\n\n"
    )
    text += rows(["method", "parameters, MiniLM", "SmolLM2", *tasks], lines)
    if "learning_rates.png" in drawn:
        text += "\n\n![Validation score over the learning rate](learning_rates.png)"
    return text


def scores(table: Table, wanted: Sequence[str], role: str) -> str:
    """Means of these tasks, and paired differences to the two rivals."""
    tasks = [task for task in wanted if task in table]
    names = [method for method in METHODS if any(method in table[task] for task in tasks)]
    if not tasks:
        return ""
    heads = [f"{task}, {UNITS.get(task, 'accuracy, %')}" for task in tasks]
    seeds = len(next(iter(table[tasks[0]].values())).final)
    parts = [f"## Scores of the {role} tasks\n\nMeans of {seeds} seeds on test data, 95 % (t)."]

    def score(task: str, method: str) -> str:
        if method not in table[task]:
            return ""
        mean, half = t_interval(table[task][method].final)
        return f"{mean:.2f} ± {half:.2f}".replace("-", "−")

    parts.append(rows(["method", *heads], [[METHODS[m].label, *(score(t, m) for t in tasks)] for m in names]))
    parts.append("Paired differences: a seed gives all methods the same data, in the same order, and the same start.")
    for rival in PRIMARY[1:]:

        def beside(task: str, method: str, rival: str = rival) -> str:
            both = method in table[task] and rival in table[task]
            return around(*t_interval(table[task][method].final - table[task][rival].final)) if both else ""

        lines = [[METHODS[m].label, *(beside(t, m) for t in tasks)] for m in names if m != rival]
        parts.append(rows([f"− {METHODS[rival].label}", *tasks], lines))
    if far := [line for task in tasks for m, s in table[task].items() for line in _far(task, m, s.final)]:
        parts.append(
            f"All runs count as they are. More than {_FAR} standard deviations (of 1.48 median deviations each) from "
            f"the median of their method are: {'; '.join(far)}."
        )
    return "\n\n".join(parts)


def _far(task: str, method: str, final: NDArray[np.float64]) -> list[str]:
    """The runs that single themselves out, which a mean and its interval would hide."""
    middle = np.median(final)
    distance = np.abs(final - middle)
    far = final[distance > _FAR * 1.4826 * np.median(distance)]
    numbers = [f"{x:.2f} (median {middle:.2f})".replace("-", "−") for x in far]
    return [f"{METHODS[method].label} on {task}, {number}" for number in numbers]
