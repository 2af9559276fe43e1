"""DDP, FSDP2 and distributed checkpoints: many processes compute what one does."""

import copy
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.accuracy import assert_accurate, assert_equal
from helpers.distributed import NCCL, RankErrors, launch
from helpers.timing import times_in_turn
from helpers.training import (
    ADAPTERS,
    BATCH,
    HIDDEN,
    RANK,
    WIDTH,
    Model,
    Run,
    assert_as_on_one_process,
    distribute,
    train,
    train_all,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.collectives import Collectives
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


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{}ranks".format)
def trained(request) -> dict:
    """What the ranks of one launch got for each of RUNS: {run: (rank 0's results, rank 1's, ...)}."""
    return dict(zip(RUNS, zip(*launch(train_all, request.param, RUNS, timeout=120), strict=True), strict=True))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_five_steps_equal_those_of_one_process(trained, run):
    first, *others = trained[run]
    assert_as_on_one_process(first, run)
    for other in others:
        assert_equal(other, first)


GPU_RUNS = [
    Run("ddp"),
    Run("fsdp"),
    Run("fsdp", "col_row", checkpointing="inside"),
    Run("fsdp", detach_norm=True, checkpointing="before"),
    Run("fsdp", micro_batches=2, offload=True),
    Run("fsdp", precision="bf16_base", checkpointing="inside"),
    Run("fsdp", "col_row", precision="bf16_policy"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("run", GPU_RUNS, ids=str)
def test_one_rank_on_a_gpu_equals_the_bare_model(run):
    (actual,) = launch(train, 1, run, "cuda", backend=NCCL, timeout=120)
    assert_as_on_one_process(actual, run, "cuda")


LARGE = [(4096, 14336), (14336, 4096)]  # in and out features


def time_one_rank() -> dict[str, float]:
    """Milliseconds of forward and backward of two large layers: bare, and as units of FSDP on one device."""
    models = {}
    for name, layer in (("bora", FusedBoraLinear), ("frozen", nn.Linear)):
        bare = nn.Sequential(*(layer(*size, device="cuda", dtype=torch.bfloat16) for size in LARGE))
        if layer is nn.Linear:
            bare.requires_grad_(False)
        sharded = copy.deepcopy(bare)
        for module in (*sharded, sharded):
            fully_shard(module, mesh=init_device_mesh("cuda", (1,)))
        models |= {name: bare, f"{name} fsdp": sharded}
    x = torch.randn(8192, LARGE[0][0], dtype=torch.bfloat16, device="cuda", requires_grad=True)
    return times_in_turn({name: lambda model=model: model(x).sum().backward() for name, model in models.items()})


@pytest.mark.gpu
def test_one_rank_costs_at_most_3_percent():
    """Beyond what FSDP2 itself costs: PyTorch 2.11 gathers, that is copies, a weight even on one rank."""
    (times,) = launch(time_one_rank, 1, backend="nccl")
    own = times["frozen fsdp"] - times["frozen"]
    assert times["bora fsdp"] - own <= 1.03 * times["bora"], times


# ---- what is communicated ----


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


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "path", [("fsdp4", "fsdp2", "single"), ("single", "fsdp2", "fsdp4"), ("ddp2", "fsdp4", "ddp2")]
)
def test_training_goes_on_from_a_checkpoint_on_other_ranks(path, tmp_path):
    """Steps 0 and 1, step 2, and steps 3 and 4, each on another number of ranks or with another layout."""
    parts = []
    for i, (place, steps) in enumerate(zip(path, (range(0, 2), range(2, 3), range(3, 5)), strict=True)):
        run = Run(strategy := place.rstrip("24"), checkpointing="before" if strategy == "fsdp" else "")
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


def consolidate(run: Run, x: torch.Tensor, file: str) -> torch.Tensor:
    """Writes the adapter to a file and returns the output."""
    model = distribute(run, Model(run), "cpu")
    options = replace(ADAPTERS, full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        torch.save(state, file)
    return model(x).detach()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_consolidated_adapter_loads_on_one_device(strategy, tmp_path):
    """One file of whole tensors under the names of the model that was not distributed."""
    x, file = torch.randn(BATCH, WIDTH), str(tmp_path / "adapter.pt")
    y, _ = launch(consolidate, 2, Run(strategy), x, file)
    model = Model(Run())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        nn.init.constant_(parameter, torch.nan)
    state = torch.load(file)
    assert state.keys() == trained.keys()
    model.load_state_dict(state, strict=False)
    assert torch.equal(model(x), y)


# ---- sharded parameters outside a forward ----


def start_from_meta(weight: torch.Tensor) -> dict:
    """A layer made on "meta", sharded, and given a weight that the first rank has; every rank draws other numbers."""
    torch.manual_seed(dist.get_rank())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = fully_shard(FusedBoraLinear(HIDDEN, WIDTH, r=RANK, bias=False, device="meta"), mesh=mesh)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(layer, {"weight": weight} if dist.get_rank() == 0 else {}, options=options)
    layer.reset_parameters()
    return {name: parameter.detach().full_tensor() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_layer_made_on_meta_starts_from_the_real_weight(world_size):
    linear = nn.Linear(HIDDEN, WIDTH, bias=False)
    torch.manual_seed(0)  # as the first rank
    expected = dict(FusedBoraLinear.from_linear(linear, r=RANK).named_parameters())
    for rank in launch(start_from_meta, world_size, linear.weight.detach()):
        for name in ("weight", "lora_A", "lora_B"):
            assert torch.equal(rank[name], expected[name])
        norms = {f"magnitude_{axis}": linear.weight.double().norm(dim=dim) for axis, dim in (("row", 1), ("col", 0))}
        assert_accurate({n: rank[n] for n in norms}, {n: expected[n] for n in norms}, norms, samples=WIDTH)


def use_sharded() -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = Model(Run()).blocks[0].up
    expected = layer.effective_weight()
    fully_shard(layer, mesh=mesh)
    uses = {
        "effective_weight": layer.effective_weight,
        "merge": layer.merge,
        "to_linear": layer.to_linear,
        "forward": lambda: layer.forward(torch.randn(BATCH, WIDTH)),  # past the hooks of FSDP
        "from_linear": lambda: FusedBoraLinear.from_linear(fully_shard(nn.Linear(WIDTH, HIDDEN), mesh=mesh)),
    }
    messages = {}
    for name, use in uses.items():
        with pytest.raises(TypeError) as error:
            use()
        messages[name] = str(error.value)
    assert not layer.merged
    layer.unshard()
    layer.merge()
    assert torch.equal(layer.merged_weight, expected)
    return messages


def test_sharded_weight_is_refused_and_a_gathered_one_is_merged():
    messages, _ = launch(use_sharded, 2)
    for name, message in messages.items():
        argument = "linear.weight" if name == "from_linear" else "weight"
        assert message.startswith(f"{argument} must be a plain dense tensor, got a DTensor (sharded"), name


# ---- a rank that fails ----


def fail_on_rank_1(run: Run, how: str) -> None:
    model = distribute(run, Model(run), "cpu")
    if dist.get_rank() == 1:
        layer = [module for module in model.modules() if isinstance(module, FusedBoraLinear)][2]
        layer.register_forward_pre_hook(lambda *_: (torch.randn(BATCH, WIDTH + 1),) if how == "raise" else os._exit(7))
    for _ in range(2):
        model(torch.randn(BATCH, WIDTH)).sum().backward()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ["raise", "die"])
def test_failure_of_one_rank_ends_all_with_an_error(strategy, how):
    """The one that fails says why; the others end with the error of a collective, and none by the time limit."""
    with pytest.raises(RankErrors) as caught:
        launch(fail_on_rank_1, 4, Run(strategy), how, timeout=60)
    errors = caught.value.errors
    assert errors.keys() == {0, 1, 2, 3}
    expected = f"ValueError: x must be [..., {WIDTH}]" if how == "raise" else "died with exit code 7"
    assert expected in errors.pop(1)
    for other in errors.values():
        assert "Error" in other and "peer" in other and "FusedBoraLinear" not in other, other
