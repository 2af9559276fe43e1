"""Groups of parameters for optimizers."""

import pytest
import torch
from torch import nn

from bora_kernels import convert, parameter_groups


def model():
    return nn.ModuleDict({"up": nn.Linear(7, 9), "down": nn.Linear(9, 5), "lora_head": nn.Linear(5, 2)})


def found(groups, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: sorted(names[id(p)] for p in group["params"]) for group in groups}


def test_groups_of_a_converted_model():
    adapted = convert(model(), target_modules=["up", "down"])
    adapted["lora_head"].requires_grad_()
    groups = parameter_groups(adapted, lr=0.1, lora_B=4, magnitudes=0.5, weight_decay=0.01)
    layers = ("down", "up")
    assert found(groups, adapted) == {
        "lora_A": [f"{layer}.lora_A" for layer in layers],
        "lora_B": [f"{layer}.lora_B" for layer in layers],
        "magnitudes": [f"{layer}.magnitude_{axis}" for layer in layers for axis in ("col", "row")],
        "others": ["lora_head.bias", "lora_head.weight"],
    }
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"lora_A": (0.1, 0.01), "lora_B": (0.4, 0.01), "magnitudes": (0.05, 0.0), "others": (0.1, 0.01)}
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(adapted, lr=0.1, lora_B=4, magnitudes=0.0))
    adapted["down"](adapted["up"](torch.randn(3, 7))).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"up.lora_B", "down.lora_B"}  # A has no gradient while B is zero


def test_groups_of_a_model_in_peft():
    peft = pytest.importorskip("peft")
    from bora_kernels.integrations.peft import BoraConfig

    base = nn.ModuleDict({"tokens": nn.Embedding(11, 7), **model()})
    adapted = peft.get_peft_model(base, BoraConfig(r=2, target_modules=["tokens", "up"]))
    names = found(parameter_groups(adapted, lr=1.0), adapted)
    assert {group: len(members) for group, members in names.items()} == {"lora_A": 2, "lora_B": 2, "magnitudes": 4}
    assert all("magnitude" in name for name in names["magnitudes"])


@pytest.mark.parametrize("option", ["lr", "lora_B", "magnitudes", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_rates_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least 0 and finite, got {value}"):
        parameter_groups(convert(model()), **{"lr": 1.0, option: value})


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(
        ValueError, match="model must have parameters that require a gradient, got a Linear without any"
    ):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), lr=1.0)
