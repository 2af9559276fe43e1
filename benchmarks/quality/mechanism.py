"""Figures 2 and 3: what single steps and a whole training change in magnitudes and directions of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from bora_kernels.analysis import Change, correlation, weight_change

from .methods import Layers
from .session import Cell, Session
from .stages import Jobs, Plan
from .training import Run

METHODS = ("lora", "dora", "bora", "full")
SEEDS = tuple(range(3001, 3005))
_STEPS, _CHECKPOINTS = 8, 4


class Watcher:
    """Changes of every layer for every run: in some single steps, and from W0 at some checkpoints.

    ``steps`` and ``starts`` hold a list of changes for each run; ``Change.step`` is the step, or the checkpoint.
    """

    def __init__(self, runs: int, steps: int) -> None:
        self.single = set(np.linspace(1, steps, _STEPS).round().astype(int).tolist())
        self.checkpoints = set(np.linspace(0, steps, _CHECKPOINTS + 1).round().astype(int).tolist()[1:])
        self.steps: list[list[Change]] = [[] for _ in range(runs)]
        self.starts: list[list[Change]] = [[] for _ in range(runs)]
        self._first: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def __call__(self, done: int, layers: Layers) -> None:
        now: dict[str, Tensor] = {}
        if done == 0 or done in self.single | self.checkpoints or done + 1 in self.single:
            now = {name: layers.effective_weight(name).detach().clone() for name in layers.weights}
        if done == 0:
            self._first = now
        if done in self.single:
            self._compare(self.steps, self._before, now, done)
        if done in self.checkpoints:
            self._compare(self.starts, self._first, now, done)
        self._before = now

    @staticmethod
    def _compare(found: list[list[Change]], before: dict[str, Tensor], after: dict[str, Tensor], step: int) -> None:
        for name in after:
            for run, changes in enumerate(found):
                changes.append(weight_change(before[name][run], after[name][run], name, step))


def jobs(plan: Plan, tasks: Sequence[str], seeds: Sequence[int] = SEEDS) -> Jobs:
    """A job for each task and method at the learning rate that stage 1 chose."""
    session: Session = plan.session

    def watched(task: str, method: str) -> None:
        rate = plan.rate(task, method)
        if rate is None:
            return
        runs = tuple(Run(seed, rate) for seed in seeds)
        watcher = Watcher(len(runs), session.task(task).sizes.steps)
        records = session.run(Cell("mechanism", task, method, runs), watch=watcher)
        if not watcher.steps[0]:
            return  # an earlier session did it
        for i, record in enumerate(records):
            record["steps"], record["starts"] = (list(map(_row, c[i])) for c in (watcher.steps, watcher.starts))
        session.save()

    return [
        (f"{method} on {task}", partial(watched, task, method))
        for task in tasks
        for method in METHODS
        if method in plan.methods
    ]


def _row(change: Change) -> list:
    """A change as [layer, step, ΔM row, ΔD row, ΔM column, ΔD column], to five digits."""
    numbers = (change.magnitude_row, change.direction_row, change.magnitude_col, change.direction_col)
    return [change.layer, change.step, *(float(f"{number:.5g}") for number in numbers)]


def changes(rows: list[list]) -> list[Change]:
    """What ``_row`` wrote."""
    return [Change(*row) for row in rows]


def correlations(records: Sequence[dict]) -> dict[str, list[float]]:
    """Correlations of ΔD and ΔM for each seed, by title.

    Over layers within a step and within a checkpoint, by output and input feature; and over the query matrices and all
    checkpoints together, by output feature, which is how DoRA's figure 2 was made.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        for key, title in (("steps", "step"), ("starts", "from W0")):
            for axis, name in (("row", "output"), ("col", "input")):
                value = correlation(changes(record[key]), axis)
                found.setdefault(f"{title}, by {name}", []).append(value)
        queries = [replace(c, step=None) for c in changes(record["starts"]) if c.layer.endswith(("query", "q_proj"))]
        found.setdefault("queries, by output", []).append(correlation(queries, "row"))
    return found
