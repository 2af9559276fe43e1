"""The PEFT integration under DDP and FSDP2: many processes compute what one does, and its adapter is saved whole."""

import pytest
import torch
import torch.distributed as dist
from helpers.distributed import launch
from helpers.training import RANK, WIDTH, Run, assert_as_on_one_process, train_all
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

peft = pytest.importorskip("peft")
bora = pytest.importorskip("bora_kernels.integrations.peft")

RUNS = [
    Run(strategy, order, checkpointing=checkpointing, peft=True)
    for strategy in ("ddp", "fsdp")
    for order, checkpointing in (("row_col", ""), ("col_row", "inside"))
]
RUNS += [
    Run("fsdp", detach_norm=True, peft=True, micro_batches=2),
    Run("fsdp", precision="bf16_base", peft=True),
    Run("fsdp", precision="bf16_policy", peft=True),
]


@pytest.fixture(scope="module")
def trained() -> dict:
    return dict(zip(RUNS, launch(train_all, 2, RUNS)[0], strict=True))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_five_steps_equal_those_of_one_process(trained, run):
    assert_as_on_one_process(trained[run], run)


def linears() -> torch.nn.Module:
    """A model for ``get_peft_model``; the same on every call."""
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.GELU(), torch.nn.Linear(2 * WIDTH, WIDTH))


def save(folder: str, x: torch.Tensor) -> torch.Tensor:
    """Shards a model of PEFT, moves its adapter off the start and saves it; returns the output."""
    model = peft.get_peft_model(linears(), bora.BoraConfig(r=RANK, target_modules=["0", "2"], init_lora_weights=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    y = model(x).detach()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    return y


def test_saved_adapter_loads_on_one_device(tmp_path):
    x = torch.randn(8, WIDTH)
    y, _ = launch(save, 2, str(tmp_path), x)
    model = peft.PeftModel.from_pretrained(linears(), str(tmp_path))
    assert not torch.allclose(y, linears()(x))
    assert torch.equal(model(x), y)
