"""DDP, FSDP2 and distributed checkpoints: many processes compute what one does."""

import functools
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_accurate
from distributed import RankErrors, launch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from training import ADAPTERS, HIDDEN, RANK, STEPS, WIDTH, Model, Run, distribute, train

from bora_kernels import FusedBoraLinear

# ---- the same numbers ----

RUNS = [
    Run(strategy, order, detach_norm, checkpointing)
    for strategy in ("ddp", "fsdp")
    for order in ("row_col", "col_row")
    for detach_norm in (False, True)
    for checkpointing in ("", "inside")
]
RUNS += [
    Run("fsdp", "row_col", checkpointing="before"),
    Run("fsdp", "col_row", checkpointing="after"),
    Run("fsdp", "row_col", micro_batches=2),
    Run("fsdp", "col_row", micro_batches=2, checkpointing="inside"),
    Run("fsdp", offload=True),
    Run("ddp", micro_batches=2),
    Run("ddp", precision="bf16_base"),
]
RUNS += [
    Run("fsdp", order, checkpointing=checkpointing, precision=precision)
    for precision in ("bf16_base", "bf16_policy")
    for order, checkpointing in (("row_col", ""), ("col_row", "inside"))
]


@functools.cache
def single(run: Run, exact: bool) -> dict:
    return train(run, exact=exact)


@functools.cache
def trained_by(world_size: int) -> dict:
    """What each rank got for each of RUNS: {run: [rank's results]}."""
    return dict(zip(RUNS, zip(*launch(train_all, world_size, RUNS, timeout=120), strict=True), strict=True))


def train_all(runs: list[Run]) -> list[dict]:
    return [train(run) for run in runs]


def assert_as_on_one_process(actual: dict, run: Run) -> None:
    """By the accuracy rule: "plain" is the layer on one process, "exact" the dense reference in float64."""
    one = replace(run, strategy="single", checkpointing="", micro_batches=1, offload=False)
    triple = actual, single(one, exact=False), single(one, exact=True)
    for names, samples in (({"loss"}, STEPS), (actual.keys() - {"loss"}, RANK * WIDTH)):
        assert_accurate(*({name: results[name] for name in names} for results in triple), samples=samples)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("world_size", [2, 4], ids="{}ranks".format)
def test_five_steps_equal_those_of_one_process(world_size, run):
    first, *others = trained_by(world_size)[run]
    assert_as_on_one_process(first, run)
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())


# ---- what is communicated ----


class Collectives(TorchDispatchMode):
    """Lists each collective with the number of elements of its larger side."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if "c10d" in operator.namespace:
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.seen.append((operator.__name__.split(".")[0].strip("_"), max(t.numel() for t in tensors)))
        return operator(*args, **(kwargs or {}))


def collectives_of_a_step(run: Run) -> list[tuple[str, int]]:
    model = distribute(run, Model(run), "cpu")
    for _ in range(2):  # DDP settles its buckets in the first step
        with Collectives() as collectives:
            model(torch.randn(BATCH, WIDTH)).sum().backward()
    return [(name, size) for name, size in collectives.seen if name != "broadcast"]  # DDP's bucket sizes


checkpointings = pytest.mark.parametrize("checkpointing", ["", "inside"], ids=["plain", "checkpointing"])


@checkpointings
@pytest.mark.parametrize("order", ["row_col", "col_row"])
def test_fsdp_moves_parameters_twice_and_gradients_once(order, checkpointing):
    """FSDP pads the first dimension to a multiple of the ranks; the layers add no collective of their own."""
    world_size = 4
    run = Run("fsdp", order, checkpointing=checkpointing)

    def elements(module, **condition):
        parameters = [p for p in module.parameters() if p.requires_grad or not condition]
        return sum(-(-p.shape[0] // world_size) * world_size * p[0].numel() for p in parameters)

    model = Model(run)
    expected = [("allgather_base", elements(model.head))]
    for block in model.blocks:
        expected += 2 * [("allgather_base", elements(block))]
        expected += [("reduce_scatter_base", elements(block, trained=True))]
    for seen in launch(collectives_of_a_step, world_size, run):
        assert sorted(seen) == sorted(expected)


@checkpointings
def test_ddp_reduces_the_gradients_of_adapters_only(checkpointing):
    run = Run("ddp", checkpointing=checkpointing)
    trained = sum(p.numel() for p in Model(run).parameters() if p.requires_grad)
    assert launch(collectives_of_a_step, 2, run) == 2 * [[("allreduce", trained)]]


# ---- checkpoints ----


@pytest.mark.parametrize("path", [("fsdp4", "fsdp2", "single"), ("single", "fsdp2", "fsdp4"), ("ddp2", "fsdp4", "ddp2")])
def test_training_goes_on_from_a_checkpoint_on_other_ranks(path, tmp_path):
    """Steps 0 and 1, step 2, and steps 3 and 4, each on another number of ranks or with another layout."""
    parts = []
    for i, (place, steps) in enumerate(zip(path, (range(0, 2), range(2, 3), range(3, 5)), strict=True)):
        run = Run(place.rstrip("24"))
        resume, save = str(tmp_path / f"{i}") if i else None, str(tmp_path / f"{i + 1}")
        if run.strategy == "single":
            parts.append(train(run, steps=steps, resume=resume, save=save))
        else:
            parts.append(launch(train_some, int(place[-1]), run, steps, resume, save)[0])
    whole = {
        name: torch.cat([part[name] for part in parts]) if name == "loss" or name.startswith("d_") else value
        for name, value in parts[-1].items()
    }
    assert_as_on_one_process(whole, Run())


def train_some(run: Run, steps: range, resume: str | None, save: str) -> dict:
    return train(run, steps=steps, resume=resume, save=save)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_consolidated_adapter_loads_on_one_device(strategy):
    """The adapter's parameters alone, whole, under the names of the model that was not distributed."""
    first, *others = launch(consolidated_adapter, 2, Run(strategy))
    state, expected, y = first
    assert all(other[0] == {} for other in others if strategy == "fsdp")  # only the first rank holds it
    model = Model(Run())
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert state.keys() == names and all(state[name].dtype == torch.float32 for name in names)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.constant_(p, torch.nan)
    set_model_state_dict(model, state, options=ADAPTERS)
    assert_accurate({"y": model(probe())}, {"y": y}, {"y": model.double()(probe().double())}, samples=RANK * WIDTH)
