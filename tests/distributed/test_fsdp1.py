"""FSDP1, which is refused by a sentence that names FSDP2."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from bora_kernels import convert

CPU = torch.device("cpu")
FSDP2 = r"FSDP2 \(torch.distributed.fsdp.fully_shard; fsdp_version: 2 of accelerate\)"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4, bias=False))


def adapted(way):
    if way == "convert":
        return convert(network(), r=2)
    peft = pytest.importorskip("peft")
    from bora_kernels.integrations.peft import BoraConfig

    return peft.get_peft_model(network(), BoraConfig(r=2, target_modules=["0", "2"]))


@pytest.mark.parametrize("way", ["convert", "peft"])
def test_one_flat_parameter_of_frozen_weights_and_adapters_is_refused(way):
    model = FullyShardedDataParallel(adapted(way), use_orig_params=True, device_id=CPU)
    with pytest.raises(ValueError, match=f"weight must be a parameter of its own, got a part of .*{FSDP2}"):
        model(torch.randn(3, 4))


def test_factors_that_are_units_of_their_own_are_refused():
    """What PEFT's own policy makes of them."""
    model = adapted("peft")
    policy = functools.partial(
        lambda_auto_wrap_policy,
        lambda_fn=lambda m: not any(m.children()) and getattr(getattr(m, "weight", None), "requires_grad", False),
    )
    sharded = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=CPU)
    with pytest.raises(ValueError, match=f"lora_A and lora_B of 0 must not be units of .*{FSDP2}"):
        sharded(torch.randn(3, 4))
