"""Paired comparisons: sign flips, Holm, intervals, and a bootstrap that chooses the learning rate anew."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Key = TypeVar("Key")
FLIPS, RESAMPLES, LEVEL = 100_000, 10_000, 0.95
_EXACT = 14  # pairs up to which all signs are tried


@dataclass(frozen=True)
class Scores:
    """One method on one task: stage 1 for each learning rate and seed, and stage 2 at the chosen one for each seed."""

    rates: tuple[float, ...]
    validation: Array  # [rates, seeds of stage 1]
    test: Array  # [rates, seeds of stage 1]
    chosen: int
    final: Array  # [seeds of stage 2]


@dataclass(frozen=True)
class Contrast:
    """A difference of two methods, pooled over tasks in seed standard deviations."""

    estimate: float
    low: float
    high: float
    level: float
    p: float
    p_holm: float
    tasks: Mapping[str, tuple[float, float, float]]  # estimate and 95 % interval of each task, in the same unit
    without: Mapping[str, float]  # the estimate without each task


def sign_flip_p(differences: Sequence[float] | Array, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p of the mean of paired differences: exact up to 14 pairs, else by random flips of signs."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) <= _EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum()).mean())
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.int8), (flips, len(d)))
    extreme = (np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum()).sum()
    return float((extreme + 1) / (flips + 1))  # the observed signs are one of the flips


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's adjusted p: the k-th smallest of m times m − k + 1, at least as large as the one before, at most 1."""
    adjusted: dict[Key, float] = {}
    worst = 0.0
    for rank, key in enumerate(sorted(p, key=p.__getitem__)):
        worst = max(worst, min(1.0, p[key] * (len(p) - rank)))
        adjusted[key] = worst
    return adjusted


def t_interval(values: Sequence[float] | Array, level: float = LEVEL) -> tuple[float, float]:
    """Mean of normal values, and half the width of Student's interval (nan for one value)."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float(x.mean()), math.nan
    return float(x.mean()), t_quantile(len(x) - 1, (1 + level) / 2) * float(x.std(ddof=1)) / math.sqrt(len(x))


def t_quantile(freedom: int, q: float) -> float:
    """Student's quantile for q > ½, by bisection on the incomplete integral of the density."""

    def upper_tail(t: float) -> float:  # with t = √ν·tan θ the density is cos^(ν−1) θ
        theta = np.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 4001)
        constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
        y = np.cos(theta) ** (freedom - 1)
        return constant * float(((y[:-1] + y[1:]) / 2).sum() * (theta[1] - theta[0]))

    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle) > 1 - q else (low, middle)
    return (low + high) / 2


def resampled(scores: Scores, first: NDArray[np.intp], second: NDArray[np.intp]) -> Array:
    """The method's mean score in each resample [B], the learning rate chosen anew.

    ``first`` [B, n] and ``second`` [B, m] are the seeds drawn of stages 1 and 2. Where another rate has the best mean
    validation score of the drawn seeds, the score moves by the difference of their stage-1 test scores at the two.
    """
    chosen = scores.validation[:, first].mean(2).argmax(0)  # [B]
    test = scores.test[:, first].mean(2)
    moved = test[chosen, np.arange(len(first))] - test[scores.chosen]
    return scores.final[second].mean(1) + moved


def seed_deviation(scores: Sequence[Scores]) -> float:
    """Standard deviation between seeds, the root of the methods' mean variance."""
    return math.sqrt(float(np.mean([s.final.var(ddof=1) for s in scores])))


def choices(scores: Scores) -> dict[float, float]:
    """{learning rate: in which share of all resamples of stage 1's seeds it is chosen}, those that ever are."""
    seeds = scores.validation.shape[1]
    first = np.array(list(itertools.product(range(seeds), repeat=seeds)))
    places, counts = np.unique(scores.validation[:, first].mean(2).argmax(0), return_counts=True)
    return {scores.rates[place]: float(count / len(first)) for place, count in zip(places, counts, strict=True)}


def pooled_differences(
    table: Mapping[str, Mapping[str, Scores]], pair: tuple[str, str], unit: Mapping[str, float]
) -> Array:
    """The difference of two methods at their chosen rates for each seed of stage 2, averaged over tasks, in units."""
    a, b = pair
    return np.mean([(methods[a].final - methods[b].final) / unit[task] for task, methods in table.items()], 0)


def contrasts(
    table: Mapping[str, Mapping[str, Scores]],
    pairs: Sequence[tuple[str, str]],
    unit: Mapping[str, float],
    resamples: int = RESAMPLES,
    seed: int = 1,
) -> dict[tuple[str, str], Contrast]:
    """Each pair of methods, pooled over the tasks of ``table`` {task: {method: scores}}, with Holm over the pairs.

    Every method has the same seeds in every task. ``unit`` divides a task's differences. The pair with the k-th
    smallest p of m gets an interval of level 1 − 0.05 / (m − k + 1).
    """
    some = next(iter(next(iter(table.values())).values()))
    rng = np.random.default_rng(seed)
    first = rng.integers(some.validation.shape[1], size=(resamples, some.validation.shape[1]))
    second = rng.integers(len(some.final), size=(resamples, len(some.final)))
    drawn = {
        (task, method): resampled(scores, first, second) / unit[task]
        for task, methods in table.items()
        for method, scores in methods.items()
    }
    differences, draws = {}, {}
    for a, b in pairs:
        differences[a, b] = {
            task: (methods[a].final - methods[b].final) / unit[task] for task, methods in table.items()
        }
        draws[a, b] = {task: drawn[task, a] - drawn[task, b] for task in table}
    p = {pair: sign_flip_p(pooled_differences(table, pair, unit)) for pair in pairs}
    adjusted, found = holm(p), {}
    order = sorted(p, key=p.__getitem__)
    for pair in pairs:
        level = 1 - (1 - LEVEL) / (len(pairs) - order.index(pair))
        by_task = {task: float(d.mean()) for task, d in differences[pair].items()}
        low, high = _percentiles(np.mean(list(draws[pair].values()), 0), level)
        tasks = {task: (by_task[task], *_percentiles(draws[pair][task], LEVEL)) for task in table}
        without = {
            task: float(np.mean([value for other, value in by_task.items() if other != task]))
            for task in (table if len(table) > 1 else ())
        }
        estimate = float(np.mean(list(by_task.values())))
        found[pair] = Contrast(estimate, low, high, level, p[pair], adjusted[pair], tasks, without)
    return found


def _percentiles(draws: Array, level: float) -> tuple[float, float]:
    low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
