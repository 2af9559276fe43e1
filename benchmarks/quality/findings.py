"""From the record of runs to what they say: scores by method, the primary contrasts, and the finding of ``PLAN.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .methods import CONTRASTS, METHODS, PRIMARY
from .stages import STAGE1_SEEDS, STAGE2_SEEDS, chosen_rate
from .statistics import Contrast, Scores, contrasts, seed_deviation
from .tasks import PRIMARY_TASKS

SMALLEST, NEEDED_TASKS = 0.2, 3  # of an effect, in seed standard deviations; of tasks with the effect's sign
REPRODUCED, NOT_REPRODUCED, UNDECIDED, INCOMPLETE = "reproduced", "not reproduced", "undecided", "incomplete"


def scores(
    records: Iterable[dict],
    metric: str = "score",
    seeds1: Sequence[int] = STAGE1_SEEDS,
    seeds2: Sequence[int] = STAGE2_SEEDS,
) -> dict[str, dict[str, Scores]]:
    """{task: {method: scores}} of all methods whose stages 1 and 2 are complete.

    With ``metric="loss"`` the scores are −100 times the test loss, at the learning rates that the score chose.
    """
    records = list(records)
    runs = {
        (r["stage"], r["task"], r["method"], r["lr"], r["seed"]): r
        for r in records
        if r["stage"] in ("stage1", "stage2")
    }

    def value(record: dict, part: str) -> float:
        return record[part] if metric == "score" else -100 * record[f"{part}_loss"]

    found: dict[str, dict[str, Scores]] = {}
    for task, method in sorted({(r["task"], r["method"]) for r in records if r["stage"] == "stage1"}):
        rate = chosen_rate(records, task, method, seeds1)
        final = [run for seed in seeds2 if (run := runs.get(("stage2", task, method, rate, seed))) is not None]
        if rate is None or len(final) < len(seeds2):
            continue
        rates = tuple(sorted({key[3] for key in runs if key[:3] == ("stage1", task, method)}))
        first = [[runs["stage1", task, method, lr, seed] for seed in seeds1] for lr in rates]
        found.setdefault(task, {})[method] = Scores(
            rates,
            np.array([[r["validation"] for r in row] for row in first]),  # what chose, whatever the metric
            np.array([[value(r, "test") for r in row] for row in first]),
            rates.index(rate),
            np.array([value(r, "test") for r in final]),
        )
    return {task: {m: methods[m] for m in METHODS if m in methods} for task, methods in found.items()}


def units(table: dict[str, dict[str, Scores]]) -> dict[str, float]:
    """The seed standard deviation of each task that has the primary methods."""
    return {
        task: seed_deviation([methods[m] for m in PRIMARY])
        for task, methods in table.items()
        if all(m in methods for m in PRIMARY)
    }


def primary_contrasts(
    table: dict[str, dict[str, Scores]], tasks: Sequence[str] = PRIMARY_TASKS
) -> dict[tuple[str, str], Contrast]:
    """The contrasts of the plan over those of its tasks that are complete."""
    unit = units(table)
    complete = {task: table[task] for task in tasks if task in unit}
    return contrasts(complete, CONTRASTS, unit) if complete else {}


def finding(found: dict[tuple[str, str], Contrast], tasks: Sequence[str] = PRIMARY_TASKS) -> str:
    """The rule of ``PLAN.md``; "incomplete" unless both contrasts are over all primary tasks."""
    if set(found) != set(CONTRASTS) or any(set(c.tasks) != set(tasks) for c in found.values()):
        return INCOMPLETE
    if any(contrast.high < SMALLEST for contrast in found.values()):
        return NOT_REPRODUCED
    if all(
        contrast.low > 0
        and contrast.estimate >= SMALLEST
        and sum(estimate > 0 for estimate, *_ in contrast.tasks.values()) >= NEEDED_TASKS
        for contrast in found.values()
    ):
        return REPRODUCED
    return UNDECIDED


def at_edge(scores_: Scores) -> bool:
    """Whether the best learning rate is the lowest or the highest that was tried."""
    return scores_.chosen in (0, len(scores_.rates) - 1)
