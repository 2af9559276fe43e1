"""Tensor parallelism: layers sharded over ranks compute what one process does, with the messages that were derived."""

import functools
from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate
from distributed import launch
from training import RANK, STEPS, WIDTH, Run, train

# ---- training ----

RUNS = [
    Run("tp", order, detach_norm, checkpointing, sequence=detach_norm != bool(checkpointing))
    for order in ("row_col", "col_row")
    for detach_norm in (False, True)
    for checkpointing in ("", "inside")
]
RUNS += [Run("tp", dora=True), Run("tp", dora=True, detach_norm=True, sequence=True), Run("tp", micro_batches=2)]
RUNS_2D = [replace(run, strategy="fsdp_tp") for run in RUNS]


@functools.cache
def single(run: Run, exact: bool) -> dict:
    return train(run, exact=exact)


@functools.cache
def trained_by(world_size: int) -> dict:
    """What each rank got for each of the runs: {run: [rank's results]}."""
    runs = RUNS if world_size == 2 else RUNS + RUNS_2D
    return dict(zip(runs, zip(*launch(train_all, world_size, runs, timeout=120), strict=True), strict=True))


def train_all(runs: list[Run]) -> list[dict]:
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    return [train(run) for run in runs]


@pytest.mark.parametrize(
    "world_size, run",
    [(2, run) for run in RUNS] + [(4, run) for run in RUNS + RUNS_2D],
    ids=lambda value: str(value) if isinstance(value, Run) else f"{value}ranks",
)
def test_five_steps_equal_those_of_one_process(world_size, run):
    """By the accuracy rule: "plain" is the layer on one process, "exact" the dense reference in float64."""
    first, *others = trained_by(world_size)[run]
    one = Run(order=run.order, detach_norm=run.detach_norm, dora=run.dora)
    triple = first, single(one, exact=False), single(one, exact=True)
    for names, samples in (({"loss"}, STEPS), (first.keys() - {"loss"}, RANK * WIDTH)):
        assert_accurate(*({name: results[name] for name in names} for results in triple), samples=samples)
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())
