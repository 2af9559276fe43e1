"""Tensor parallel training computes what one process does, from any checkpoint, and ends where a rank fails."""

import copy
import functools
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.accuracy import assert_accurate, assert_equal
from helpers.cases import SCALING, Case, run
from helpers.distributed import RankErrors, launch
from helpers.sharded import PLACEMENTS, STYLES, sharded_layer, styles, whole_and_sharded, x_and_dy
from helpers.timing import times_in_turn
from helpers.training import RANK, STEPS, WIDTH, Run, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from benchmarks.collectives import Collectives
from bora_kernels import FusedBoraLinear, bora_linear, reuse_scales
from bora_kernels.distributed import BoraColwiseParallel, BoraRowwiseParallel

# ---- training ----

RUNS = [
    Run("tp", order, detach_norm, checkpointing, sequence=detach_norm != bool(checkpointing))
    for order in ("row_col", "col_row")
    for detach_norm in (False, True)
    for checkpointing in ("", "inside")
]
RUNS += [Run("tp", dora=True), Run("tp", dora=True, detach_norm=True, sequence=True), Run("tp", micro_batches=2)]
RUNS_ON = {
    2: RUNS + [Run("tp", order, precision="bf16_base") for order in ("row_col", "col_row")],
    4: RUNS[1::3]
    + [replace(run, strategy="fsdp_tp") for run in RUNS]
    + [Run("fsdp_tp", order, precision="bf16_policy") for order in ("row_col", "col_row")],
}


@functools.cache
def single(run: Run, device: str, exact: bool) -> dict:
    return train(run, device, exact=exact)


@functools.cache
def trained_by(world_size: int) -> dict:
    """What each rank got for each of the runs: {run: [rank's results]}."""
    runs = RUNS_ON[world_size]
    return dict(zip(runs, zip(*launch(train_all, world_size, runs, timeout=120), strict=True), strict=True))


def train_all(runs: list[Run], device: str = "cpu") -> list[dict]:
    # fills fresh memory with NaN; cuBLAS would refuse without an environment variable that changes what it runs
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    return [train(run, device) for run in runs]


def assert_as_on_one_process(actual: dict, run: Run, device: str = "cpu") -> None:
    """By the accuracy rule: "plain" is the layer on one process, "exact" the dense reference in float64."""
    one = Run(order=run.order, detach_norm=run.detach_norm, dora=run.dora, precision=run.precision)
    triple = actual, single(one, device, exact=False), single(one, device, exact=True)
    for names, samples in (({"loss"}, STEPS), (actual.keys() - {"loss"}, RANK * WIDTH)):
        assert_accurate(*({name: results[name] for name in names} for results in triple), samples=samples)


@pytest.mark.parametrize(
    "world_size, run",
    [
        pytest.param(world_size, run, marks=[pytest.mark.slow] * (world_size > 2))
        for world_size, runs in RUNS_ON.items()
        for run in runs
    ],
    ids=lambda value: str(value) if isinstance(value, Run) else f"{value}ranks",
)
def test_five_steps_equal_those_of_one_process(world_size, run):
    first, *others = trained_by(world_size)[run]
    assert_as_on_one_process(first, run)
    for other in others:
        assert_equal(other, first)


def train_reusing(run: Run) -> tuple[dict, int, int]:
    """What ``train`` returns within ``reuse_scales``, and the messages of that run and of one without."""
    counts = []
    for scope in (nullcontext, reuse_scales):
        with scope(), Collectives() as collectives:
            results = train(run)
        counts.append(sum(name == "allreduce" for name, _ in collectives.seen))
    return results, *counts


@pytest.mark.sampled(2)
@pytest.mark.parametrize("strategy", ["tp", "fsdp_tp"])
def test_training_within_reuse_scales_sends_them_once_a_step(strategy):
    run = Run(strategy, checkpointing="inside", micro_batches=2)
    for results, without, reusing in launch(train_reusing, 4, run):
        assert_as_on_one_process(results, run)
        assert without - reusing == STEPS * 4  # 4 layers, the second micro-batch; checkpoints find their norms anyway


# ---- checkpoints ----


def train_on(run: Run, steps: range, resume: str | None, save: str | None) -> dict:
    return train(run, steps=steps, resume=resume, save=save)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", [("tp2", "single", "fsdp_tp4"), ("fsdp4", "tp4", "tp2")], ids="-".join)
def test_training_goes_on_from_a_checkpoint_in_another_layout(path, tmp_path):
    parts = []
    for i, (place, steps) in enumerate(zip(path, (range(0, 2), range(2, 3), range(3, 5)), strict=True)):
        run = Run(place.rstrip("24"))
        arguments = (run, steps, str(tmp_path / f"{i}") if i else None, str(tmp_path / f"{i + 1}"))
        parts.append(train_on(*arguments) if place == "single" else launch(train_on, int(place[-1]), *arguments)[0])
    joined = {
        name: torch.cat([part[name] for part in parts]) if name == "loss" or name.startswith("d_") else value
        for name, value in parts[-1].items()
    }
    assert_as_on_one_process(joined, Run())


# ---- failures ----


def fail_on_rank_1(style: str) -> None:
    _, layer = whole_and_sharded(STYLES[style])
    x, dy = x_and_dy()
    for step in range(2):
        layer(x[..., 1:] if (step, dist.get_rank()) == (1, 1) else x).backward(dy)


@styles
def test_rank_that_raises_ends_the_job_with_its_error(style):
    start = time.monotonic()
    with pytest.raises(RankErrors) as caught:
        launch(fail_on_rank_1, 2, style)
    assert "ValueError: x must be [..., 27]" in caught.value.errors[1]
    assert "Connection" in caught.value.errors[0]
    assert time.monotonic() - start < 30


# ---- one rank ----


def check_one_rank(device: str, dtype: torch.dtype, N: int, K: int, M: int) -> None:
    """A group of one adds nothing: the same operators, so the same bits, and no message."""
    case = Case(M, N, K, 16, dtype=dtype)
    mesh = init_device_mesh(device, (1,))
    for placements in PLACEMENTS.values():
        with Collectives() as collectives:
            bare, sharded = (
                run(layer, case.inputs(device), case.upstream(device), scaling=SCALING)
                for layer in (bora_linear, functools.partial(sharded_layer, mesh, placements))
            )
        assert not collectives.seen
        for name, value in bare.items():
            assert torch.equal(sharded[name], value), name


def test_one_rank_computes_the_same_bits():
    launch(check_one_rank, 1, "cpu", torch.float32, 41, 27, 5)


@pytest.mark.gpu
def test_one_rank_computes_the_same_bits_over_nccl():
    launch(check_one_rank, 1, "cuda", torch.bfloat16, 4096, 4096, 2048, backend="nccl")


def time_one_rank() -> dict[str, float]:
    """Milliseconds of forward and backward of a large layer: bare, and tensor parallel on a mesh of one device."""
    mesh = init_device_mesh("cuda", (1,))
    layers = {"bare": FusedBoraLinear(4096, 14336, dtype=torch.bfloat16, device="cuda")}
    for name, style in (("colwise", BoraColwiseParallel()), ("rowwise", BoraRowwiseParallel())):
        layers[name] = parallelize_module(copy.deepcopy(layers["bare"]), mesh, style)
    x = torch.randn(8192, 4096, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    dy = torch.randn(8192, 14336, dtype=torch.bfloat16, device="cuda")
    return times_in_turn({name: lambda layer=layer: layer(x).backward(dy) for name, layer in layers.items()})


@pytest.mark.gpu
def test_one_rank_costs_at_most_3_percent():
    (times,) = launch(time_one_rank, 1, backend="nccl")
    assert max(times["colwise"], times["rowwise"]) <= 1.03 * times["bare"], times
