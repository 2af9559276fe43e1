"""What is run, in which order: see ``PLAN.md``. The primary methods come first: what is done early is of use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from .methods import METHODS, PRIMARY
from .session import Cell, Session
from .tasks import LANGUAGE_TASKS, methods_of
from .training import RANK, Run

STAGE1_SEEDS, STAGE2_SEEDS = tuple(range(1001, 1005)), tuple(range(2001, 2025))
SENSITIVITY_SEEDS = 8  # the first of stage 2
SMALL = (2, 3)  # seeds of the two stages in a small run
_POINTS, _MOST_ADDED = 5, 4  # of a grid by factors of 2
_LOWEST = {  # the lowest learning rate of the first grid
    "encoder": {"adapter": 6e-4, "full": 5e-5, "head": 1e-2},
    "language": {"adapter": 3e-4, "full": 1e-5},
}
MAGNITUDE_FACTORS, OTHER_RANKS = (0.25, 1.0, 4.0, 16.0), (2, 16)

Jobs = list[tuple[str, Callable[[], None]]]


def kind_of(method: str) -> str:
    return "adapter" if METHODS[method].is_adapter else method


def first_grid(task: str, method: str) -> list[float]:
    lowest = _LOWEST["language" if task in LANGUAGE_TASKS else "encoder"][kind_of(method)]
    return [lowest * 2**i for i in range(_POINTS)]


def widened(grid: Sequence[float], best: int, points: int = _POINTS) -> list[float] | None:
    """The grid with another point beside its best where that lies at an edge; None where it is done."""
    if 0 < best < len(grid) - 1 or len(grid) >= points + _MOST_ADDED:
        return None
    return [grid[0] / 2, *grid] if best == 0 else [*grid, grid[-1] * 2]


def best_of(records: Iterable[dict]) -> tuple[list[float], int]:
    """The learning rates of these runs in order, and the place of the one with the highest mean validation score."""
    scores: dict[float, list[float]] = {}
    for record in records:
        scores.setdefault(record["lr"], []).append(record["validation"])
    grid = sorted(scores)
    return grid, int(np.argmax([np.mean(scores[lr]) for lr in grid]))


def tune(session: Session, task: str, method: str, seeds: Sequence[int]) -> None:
    """Stage 1 of one method and task: the grid, widened until its best lies inside."""
    grid: list[float] | None = first_grid(task, method)
    while grid is not None:
        records = session.run(Cell("stage1", task, method, tuple(Run(s, lr) for lr in grid for s in seeds)))
        grid = widened(*best_of(records))


def chosen_rate(records: Iterable[dict], task: str, method: str, seeds: Sequence[int] = STAGE1_SEEDS) -> float | None:
    """The learning rate that stage 1 chose, None where stage 1 of this method and task is not complete."""
    found = [r for r in records if (r["stage"], r["task"], r["method"]) == ("stage1", task, method)]
    if len(found) < _POINTS * len(seeds) or len(found) % len(seeds):
        return None
    grid, best = best_of(found)
    return None if widened(grid, best) else grid[best]


class Plan:
    """The stages of one session; ``seeds1`` and ``seeds2`` are those of stages 1 and 2."""

    def __init__(self, session: Session, seeds1: Sequence[int], seeds2: Sequence[int], methods: Sequence[str]) -> None:
        self.session, self.seeds1, self.seeds2, self.methods = session, seeds1, seeds2, methods

    def stage1(self, tasks: Sequence[str]) -> Jobs:
        return [
            (f"learning rate of {method} on {task}", partial(tune, self.session, task, method, self.seeds1))
            for task, method in self._cells(tasks)
        ]

    def stage2(self, tasks: Sequence[str]) -> Jobs:
        return [(f"{method} on {task}", partial(self._compare, task, method)) for task, method in self._cells(tasks)]

    def both(self, tasks: Sequence[str]) -> Jobs:
        """Stages 1 and 2, first of the primary methods, then of the others one by one."""
        first, second = (stage(tasks) for stage in (self.stage1, self.stage2))
        primary = sum(method in PRIMARY for _, method in self._cells(tasks))
        rest = [job for pair in zip(first[primary:], second[primary:], strict=True) for job in pair]
        return [*first[:primary], *second[:primary], *rest]

    def sensitivity(self, tasks: Sequence[str]) -> Jobs:
        adapters = [method for method in self.methods if METHODS[method].is_adapter]
        parts: list[tuple[str, Sequence[str], dict[str, Any]]] = [
            ("own rate of magnitudes", ["dora", "bora"], {"magnitudes": MAGNITUDE_FACTORS}),
            ("LoRA's learning rate", [m for m in adapters if m != "lora"], {"rate_of": "lora"}),
            ("bfloat16 base", PRIMARY, {"base_dtype": torch.bfloat16}),
            *((f"rank {rank}", (*PRIMARY, "lora"), {"rank": rank, "rates": (0.5, 1.0, 2.0)}) for rank in OTHER_RANKS),
        ]
        return [
            (f"{title}, {method} on {task}", partial(self._sensitive, title, task, method, **options))
            for title, methods, options in parts
            for task in tasks
            for method in methods
            if method in adapters
        ]

    def rate(self, task: str, method: str) -> float | None:
        """What stage 1 chose; None, and a line that says so, where it is not complete."""
        rate = chosen_rate(self.session.records, task, method, self.seeds1)
        if rate is None:
            print(f"      passed over: stage 1 of {method} on {task} is not complete", flush=True)
        return rate

    def _cells(self, tasks: Sequence[str]) -> list[tuple[str, str]]:
        """The primary methods on all tasks, then each other method on all tasks."""
        wanted = [method for method in METHODS if method in self.methods]
        groups = [[method for method in wanted if method in PRIMARY]]
        groups += [[method] for method in wanted if method not in PRIMARY]
        return [(t, m) for group in groups for t in tasks for m in group if m in methods_of(t)]

    def _compare(self, task: str, method: str) -> None:
        if (rate := self.rate(task, method)) is not None:
            self.session.run(Cell("stage2", task, method, tuple(Run(seed, rate) for seed in self.seeds2)))

    def _sensitive(
        self,
        variant: str,
        task: str,
        method: str,
        *,
        rate_of: str | None = None,
        rates: Sequence[float] = (1.0,),
        magnitudes: Sequence[float] = (1.0,),
        rank: int = RANK,
        base_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Runs at multiples of the learning rate chosen for ``rate_of`` (the method itself), paired with stage 2's."""
        if (rate := self.rate(task, rate_of or method)) is None:
            return
        if rate_of is not None and rate == chosen_rate(self.session.records, task, method, self.seeds1):
            print(f"      {variant} is that of {method} on {task}: stage 2 has these runs", flush=True)
            return
        seeds = self.seeds2[:SENSITIVITY_SEEDS]
        runs = tuple(Run(seed, rate * by, factor) for by in rates for factor in magnitudes for seed in seeds)
        self.session.run(Cell("sensitivity", task, method, runs, variant, rank), base_dtype)
