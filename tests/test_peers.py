"""The modules beside others: PEFT's LoRA and DoRA layers, and the reference over a training run."""

import copy

import pytest
import torch
from helpers.accuracy import assert_accurate
from torch import nn

from bora_kernels import FusedBoraLinear, FusedDoraLinear

N, K, R = 40, 48, 4


def peft_twins(cls, device, **options):
    """The same layer by PEFT and by this package, after some training."""
    peft = pytest.importorskip("peft")
    linear = nn.Linear(K, N, device=device)
    module = cls.from_linear(linear, r=R, alpha=8, **options)
    with torch.no_grad():
        module.lora_B.normal_()
        module.magnitude_row *= 1 + 0.1 * torch.randn(N, device=device)
    config = peft.LoraConfig(r=R, lora_alpha=8, target_modules=["layer"], use_dora=cls is FusedDoraLinear)
    model = peft.get_peft_model(nn.ModuleDict({"layer": copy.deepcopy(linear)}), config)
    theirs = model.base_model.model["layer"]
    parameters = {"lora_A": theirs.lora_A["default"].weight, "lora_B": theirs.lora_B["default"].weight}
    if cls is FusedDoraLinear:
        parameters["magnitude_row"] = theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(getattr(module, name).view_as(parameter))
    return module, theirs, parameters


def test_dora_is_that_of_peft(device):
    module, theirs, parameters = peft_twins(FusedDoraLinear, device, detach_norm=True)
    check_twins(module, theirs, parameters, device)


def test_lora_is_that_of_peft(device):
    """LoRA is the layer whose magnitudes are absent."""
    module, theirs, parameters = peft_twins(FusedBoraLinear, device)
    module.magnitude_row = module.magnitude_col = None
    check_twins(module, theirs, parameters, device)


def check_twins(module, theirs, parameters, device):
    """Output and gradients, to a few units in the last place of float32."""
    x = torch.randn(2, 5, K, device=device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    ours, expected = {"y": module(leaves[0])}, {"y": theirs(leaves[1])}
    for output, leaf, results in zip((ours["y"], expected["y"]), leaves, (ours, expected), strict=True):
        output.square().sum().backward()
        results["d_x"] = leaf.grad
    for name, parameter in parameters.items():
        ours[f"d_{name}"] = getattr(module, name).grad
        expected[f"d_{name}"] = parameter.grad.view_as(ours[f"d_{name}"])
    exact = {name: value.double() for name, value in expected.items()}
    assert_accurate(ours, expected, exact, samples=N, floor=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [FusedBoraLinear, FusedDoraLinear])
def test_training_follows_the_reference(cls, dtype, device):
    """Two layers learn a target; every loss stays beside that of the dense, autograd reference."""
    torch.manual_seed(0)
    x = torch.randn(64, 24, device=device).to(dtype)
    target = torch.randn(64, 8, device=device)
    start = nn.Sequential(
        cls(24, 32, r=R, device=device, dtype=dtype), nn.GELU(), cls(32, 8, r=R, device=device, dtype=dtype)
    )
    losses = {}
    for backend in (None, "reference"):
        model = copy.deepcopy(start)
        model[0].backend = model[2].backend = backend
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[backend] = []
        for _ in range(30):
            loss = (model(x).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["reference"][-1] < 0.7 * losses["reference"][0]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.tensor(losses[None]), torch.tensor(losses["reference"]), rtol=tolerance, atol=0)
