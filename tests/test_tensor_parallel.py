"""Tensor parallelism: layers sharded over ranks compute what one process does, with the messages that were derived."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_accurate
from cases import NAMES, VARIANTS, Case, check_layer
from distributed import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from training import RANK, STEPS, WIDTH, Run, train

from bora_kernels import bora_linear
from bora_kernels.distributed.layout import BY_COLUMNS, BY_ROWS

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


# ---- the layer ----

PLACEMENTS = {"rows": BY_ROWS, "columns": BY_COLUMNS}
LAYERS = {
    f"{by}-{case}-{'detached' if detach_norm else 'exact'}-{backend}": (by, case, detach_norm, backend)
    for by in PLACEMENTS
    for detach_norm in (False, True)
    for backend, dtypes in (("torch", NAMES), ("triton", (torch.float32, torch.bfloat16)))
    for dtype in dtypes
    for case in (Case(5, 41, 27, 3, dtype=dtype, member=member, order=order) for member, order in VARIANTS)
}
LAYERS |= {
    f"{by}-{case}-exact-torch": (by, case, False, "torch")
    for by in PLACEMENTS
    for case in (
        Case(4, 1, 9, 2, dtype=torch.float64, order="col_row"),  # a rank without rows
        Case(4, 9, 1, 2, dtype=torch.float64),  # and one without columns
        Case(6, 3, 3, 8),
        Case(0, 8, 8, 2),
    )
}


def check_layers(names: list[str]) -> dict[str, str]:
    """What is wrong with each layer, for those with which something is."""
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    failures = {}
    for name in names:
        by, case, detach_norm, backend = LAYERS[name]
        layer = functools.partial(sharded_layer, mesh, PLACEMENTS[by])
        options = {"layer": layer, "norm_order": case.order, "detach_norm": detach_norm}
        try:
            check_layer(backend, case.inputs("cpu"), case.upstream("cpu"), **options)
        except AssertionError as error:
            failures[name] = str(error)
    return failures


def sharded_layer(mesh, placements, x, *, x_placement=None, **arguments):
    """``bora_linear`` of whole tensors by way of their shards, differentiable."""

    def shard(tensor, placement):
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False).redistribute(placements=[placement])

    x = shard(x, x_placement or Replicate())
    sharded = {name: shard(t, placements[name]) for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    return bora_linear(x, **(arguments | sharded)).redistribute(placements=[Replicate()]).to_local()


@functools.cache
def failures() -> list[dict[str, str]]:
    return launch(check_layers, 2, list(LAYERS))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_obeys_the_accuracy_rule(name):
    for failures_of_rank in failures():
        assert name not in failures_of_rank, failures_of_rank[name]


def on_two_ranks(check):
    """A test that runs on each of two ranks."""

    @functools.wraps(check)
    def test():
        launch(run_check, 2, check.__name__)

    CHECKS[check.__name__] = check
    return test


CHECKS = {}


def run_check(name: str) -> None:
    CHECKS[name]()
