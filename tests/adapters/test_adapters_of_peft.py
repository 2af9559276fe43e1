"""Adapters that PEFT reads of what is written here, and that are read here of what PEFT writes."""

import pytest
import torch
from helpers.adapted_models import Model, X, methods, perturb

import bora_kernels
from bora_kernels import convert, load_adapter, save_adapter
from bora_kernels.adapters.conversion import adapted_layers

safetensors = pytest.importorskip("safetensors.torch", reason="adapter files need safetensors")


@pytest.fixture
def peft():
    """PEFT, knowing BoRA."""
    pytest.importorskip("bora_kernels.integrations.peft", reason="the PEFT integration is needed")
    return pytest.importorskip("peft")


def unshared():
    """PEFT adapts a shared layer in its first place only."""
    torch.manual_seed(0)
    return Model(shared=False)


@methods
@pytest.mark.parametrize("head", [False, True], ids=["adapter", "adapter-and-head"])
def test_peft_loads_what_is_saved(method, head, peft, tmp_path):
    options = {"method": method, "norm_order": "col_row", "rslora": True}
    model = convert(unshared(), r=2, alpha=4, target_modules=["up"], **options)
    convert(model, r=3, alpha=6, target_modules=["down"], **options)
    if head:
        model.head.requires_grad_()
    perturb(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(unshared(), tmp_path).eval()
    assert torch.equal(theirs(X), model(X))
    theirs.save_pretrained(tmp_path)
    again = load_adapter(unshared(), tmp_path).eval()
    assert torch.equal(again(X), model(X))


@methods
@pytest.mark.parametrize("head", [None, ["head"]], ids=["adapter", "adapter-and-head"])
def test_what_peft_saves_is_loaded(method, head, peft, tmp_path):
    from bora_kernels.integrations.peft import BoraConfig

    config = BoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["up", "down"],
        rank_pattern={"down": 3},
        alpha_pattern={"block.down": 5},
        use_dora=method == "dora",
        modules_to_save=head,
    )
    theirs = perturb(peft.get_peft_model(unshared(), config))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(unshared(), tmp_path).eval()
    assert torch.equal(model(X), theirs(X))
    assert {n: (m.r, m.alpha) for n, m in adapted_layers(model).items()} == {"block.up": (2, 4), "block.down": (3, 5)}


def test_dora_of_peft_is_loaded(tmp_path):
    """To rounding: PEFT takes the norms in another way."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], use_dora=True)
    theirs = perturb(peft.get_peft_model(unshared(), config))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(unshared(), tmp_path).eval()
    assert {type(layer) for layer in adapted_layers(model).values()} == {bora_kernels.FusedDoraLinear}
    assert all(layer.detach_norm for layer in adapted_layers(model).values())
    torch.testing.assert_close(model(X), theirs(X))
