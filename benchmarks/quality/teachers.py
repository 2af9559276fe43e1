"""One layer that learns from a teacher whose difference from W0 is known: which differences does a method learn?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .graphs import captured
from .methods import METHODS, Layers, initial_parameters
from .session import Cell, Session
from .stages import Jobs, best_of, kind_of, widened
from .training import RANK, SCALING, Adam, Run, schedule

TEACHERS = {
    "low rank": "W0 + L, L of rank 4",
    "rows": "diag(u)·W0",
    "rows and columns": "diag(u)·W0·diag(v)",
    "all": "diag(u)·(W0 + 0.7·L)·diag(v)",
}
SEEDS = tuple(range(4001, 4009))
_N, _K, _SAMPLES, _BATCH, _STEPS, _NOISE = 96, 128, 1024, 64, 600, 0.1
_LOWEST, _POINTS = {"adapter": 2e-3, "full": 1e-3}, 5
_LAYER = "layer"


def jobs(session: Session, methods: Sequence[str], seeds: Sequence[int] = SEEDS, steps: int = _STEPS) -> Jobs:
    """A job for each teacher and method: its grid of learning rates, widened while the best is at an edge."""

    def tune(teacher: str, method: str) -> None:
        lowest = _LOWEST[kind_of(method)]
        grid: list[float] | None = [lowest * 2**i for i in range(_POINTS)]
        while grid is not None:
            cell = Cell("teachers", teacher, method, tuple(Run(seed, lr) for lr in grid for seed in seeds))
            records = session.run_with(
                cell, lambda runs: train(teacher, method, runs, session.device, steps, session.graph)
            )
            grid = widened(*best_of(records))

    return [
        (f"{method} from {teacher}", partial(tune, teacher, method))
        for teacher in TEACHERS
        for method in methods
        if method != "head"
    ]


def base_weight() -> Tensor:
    """W0 [N, K], the same for all: rows and columns of unequal norms."""
    generator = torch.Generator().manual_seed(31_000)
    normal = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return normal(_N, _K) / math.sqrt(_K) * torch.exp(0.3 * normal(_N, 1)) * torch.exp(0.3 * normal(1, _K))


def teacher_weight(teacher: str, seed: int) -> Tensor:
    """W* [N, K]: equal seeds draw equal L, u and v for all teachers."""
    generator, weight = torch.Generator().manual_seed(32_000 + seed), base_weight()
    low = torch.randn(_N, RANK, generator=generator) @ torch.randn(RANK, _K, generator=generator)
    low *= 0.4 * weight.norm() / low.norm()
    u = torch.exp(0.3 * torch.randn(_N, 1, generator=generator))
    v = torch.exp(0.3 * torch.randn(1, _K, generator=generator))
    return {
        "low rank": weight + low,
        "rows": u * weight,
        "rows and columns": u * weight * v,
        "all": u * (weight + 0.7 * low) * v,
    }[teacher]


def train(
    teacher: str, method_name: str, runs: list[Run], device: torch.device, steps: int = _STEPS, graph: bool = True
) -> list[dict]:
    """Train all ``runs`` at once. The score is the share of the difference that was learned, in percent:

        100·(1 − ‖(W' − W*)·diag(c)‖² / ‖(W0 − W*)·diag(c)‖²)        inputs are normal with standard deviations c

    which is exact, so that validation and test are the same number.
    """
    began, method, seeds = time.perf_counter(), METHODS[method_name], [run.seed for run in runs]
    distinct = sorted(set(seeds))
    weight = base_weight().to(device)
    targets, deviations, inputs, outputs, orders = ({} for _ in range(5))
    for seed in distinct:
        generator = torch.Generator().manual_seed(33_000 + seed)
        targets[seed] = teacher_weight(teacher, seed)
        deviations[seed] = torch.exp(0.5 * torch.randn(_K, generator=generator))
        inputs[seed] = torch.randn(_SAMPLES, _K, generator=generator) * deviations[seed]
        clean = inputs[seed] @ targets[seed].T
        outputs[seed] = clean + _NOISE * clean.std() * torch.randn(clean.shape, generator=generator)
        epochs = [torch.randperm(_SAMPLES, generator=generator) for _ in range(-(-steps * _BATCH // _SAMPLES))]
        orders[seed] = torch.cat(epochs)[: steps * _BATCH].view(steps, _BATCH)
    x, y, target, c = (
        torch.stack([values[seed] for seed in seeds]).to(device) for values in (inputs, outputs, targets, deviations)
    )
    rows = torch.stack([orders[seed] for seed in seeds], 1).to(device)  # [steps, R, batch]
    parameters = initial_parameters(method, {_LAYER: weight}, seeds, RANK)
    for tensor in parameters.values():
        tensor.requires_grad_()
    layers, optimizer = Layers(method, {_LAYER: weight}, {}, parameters, SCALING), Adam(parameters, runs)
    run_number = torch.arange(len(runs), device=device)[:, None]

    def gradients(rows: Tensor) -> tuple[Tensor, ...]:
        error = layers(_LAYER, x[run_number, rows]) - y[run_number, rows]
        return torch.autograd.grad(error.square().mean((1, 2)).sum(), list(parameters.values()))

    compute = captured(gradients, rows[0], graph)
    for step in range(steps):
        optimizer.step(list(compute(rows[step])), schedule(step, steps))
    with torch.no_grad():
        left, whole = (
            ((w - target) * c[:, None]).square().sum((1, 2)) for w in (layers.effective_weight(_LAYER), weight)
        )
        scores = (100 * (1 - left / whole)).tolist()
    records, seconds = [], (time.perf_counter() - began) / len(runs)
    for i, run in enumerate(runs):
        diverged = not math.isfinite(scores[i])
        score = 0.0 if diverged else scores[i]
        record = {"task": teacher, "method": method_name, "seed": run.seed, "lr": run.lr, "rank": RANK}
        record |= {"parameters": sum(t[0].numel() for t in parameters.values()), "seconds": round(seconds, 3)}
        records.append(record | {"validation": score, "test": score, "diverged": diverged})
    return records
