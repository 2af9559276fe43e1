"""What an adapter file holds besides the adapters: biases, statistics and scales that training or the user changed."""

import json

import pytest
import torch
from helpers.adapted_models import CONFIG, K, X, base, perturb, saved, trained
from torch import nn

from bora_kernels import convert, load_adapter, save_adapter, save_as_lora


def loaded(folder):
    return load_adapter(base(), folder).eval()


def test_a_trained_bias_of_an_adapted_layer_is_saved(tmp_path):
    model = convert(base(), r=3)
    model.block["up"].bias.requires_grad_()
    perturb(model)
    save_adapter(model, tmp_path)
    other = loaded(tmp_path)
    assert torch.equal(other.block["up"].bias, model.block["up"].bias) and other.block["up"].bias.requires_grad
    assert torch.equal(other(X), model(X)) and not torch.equal(model.block["up"].bias, base().block["up"].bias)
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == "lora_only"
    assert torch.equal(load_adapter(other, tmp_path)(X), model(X))


def test_peft_and_load_adapter_read_each_others_biases(tmp_path):
    peft = pytest.importorskip("peft")
    from bora_kernels.integrations.peft import BoraConfig

    model = convert(base(), r=3)
    model.block["up"].bias.requires_grad_()
    save_adapter(perturb(model), tmp_path / "ours")
    assert torch.equal(peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()(X), model(X))

    theirs = peft.get_peft_model(base(), BoraConfig(r=2, target_modules=["up", "down"], bias="lora_only"))
    perturb(theirs).save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(loaded(tmp_path / "theirs")(X), theirs(X))


def test_another_trained_parameter_of_an_adapted_layer_is_saved(tmp_path):
    def with_gate(model):
        model.block["up"].gate = nn.Parameter(torch.zeros(2))
        return model

    model = with_gate(convert(base(), r=2))
    save_adapter(perturb(model), tmp_path)
    other = load_adapter(with_gate(convert(base(), r=2)), tmp_path)
    assert torch.equal(other.block["up"].gate, model.block["up"].gate) and other.block["up"].gate.any()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_running_statistics_that_moved_are_saved(tmp_path, norm):
    def make():
        model = base()
        model.norm = norm(K)
        return model

    model = perturb(convert(make(), r=2))
    moved = nn.BatchNorm1d(K, momentum=0.5)
    moved(5 * torch.randn(7, K))
    model.norm.load_state_dict(moved.state_dict())
    save_adapter(model, tmp_path)
    other = load_adapter(make(), tmp_path).eval()
    assert torch.equal(other.norm.running_var, moved.running_var) and other.norm.num_batches_tracked == 1
    assert not any(p.requires_grad for p in other.norm.parameters())


def test_statistics_that_did_not_move_are_not_saved(tmp_path):
    model = base().train()
    model(X)  # before the model is adapted
    save_adapter(convert(model, r=2), tmp_path)
    assert not any("norm" in name for name in _names(tmp_path))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("change", ["scaling", "alpha"])
def test_a_scaling_that_was_set_is_saved(tmp_path, change, rslora):
    model = trained(r=3, alpha=5, rslora=rslora)
    setattr(model.block["up"], change, 0.7)  # alpha alone changes nothing, neither here nor in the file
    save_adapter(model, tmp_path)
    other = loaded(tmp_path)
    torch.testing.assert_close(other(X), model(X), rtol=1e-6, atol=1e-7)
    assert other.again.alpha == 5
    load_adapter(model, tmp_path)  # it fits


def test_a_computed_factor_is_refused(tmp_path):
    class Half(nn.Module):
        def forward(self, factor):
            return factor / 2

    model = trained()
    nn.utils.parametrize.register_parametrization(model.block["up"], "lora_B", Half())
    with pytest.raises(ValueError, match=r"^block\.up\.lora_B must be a parameter of its layer"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_lora_files_hold_no_biases(tmp_path):
    model = convert(nn.Sequential(nn.Linear(K, 3), nn.Linear(3, 2)), r=2)
    model[1].bias.requires_grad_()
    with pytest.raises(ValueError, match=r"only the adapters of adapted layers to write LoRA, got 1\.bias too"):
        save_as_lora(model, tmp_path, rank=2)
    assert not list(tmp_path.iterdir())


def _names(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors").keys()


def test_frozen_biases_are_not_saved(tmp_path):
    saved(tmp_path)
    assert not any(name.endswith("bias") for name in _names(tmp_path))
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == "none"
