"""Scales that PEFT and libraries on it put on an adapter: a share of what it adds to the weight."""

import pytest
import torch
from helpers.peft_models import TOKENS, Layers, bora_layers, make_peft
from torch import nn

pytest.importorskip("peft")
from peft.helpers import rescale_adapter_scale  # noqa: E402


def outputs(model, inputs):
    with torch.no_grad():
        return model(inputs)


SCALES = {
    "set_scale": lambda model, scale: [m.set_scale("default", scale) for m in bora_layers(model).values()],
    "scale_layer": lambda model, scale: [m.scale_layer(scale) for m in bora_layers(model).values()],
    "rescale_adapter_scale": lambda model, scale: [c := rescale_adapter_scale(model, scale), c.__enter__()],
}


@pytest.mark.parametrize("way", SCALES)
@pytest.mark.parametrize("use_dora", [False, True], ids=["bora", "dora"])
def test_a_scale_is_a_share_of_what_the_adapter_adds(way, use_dora):
    """W0 + share·(W' − W0) in every layer: at 0 the base model, and linear in between, as LoRA's is."""
    torch.manual_seed(0)
    targets = ["conv1d", "conv2d", "conv3d", "transposed", "linear"] + (["embedding"] if way != "scale_layer" else [])
    base = Layers()
    start = outputs(base, TOKENS)
    model = make_peft(base, target_modules=targets, use_dora=use_dora)
    full = outputs(model, TOKENS)
    weights = {
        name: (m._base_weight().clone(), m.effective_weight("default")) for name, m in bora_layers(model).items()
    }
    for scale in (0.0, 0.3):
        held = SCALES[way](model, scale)
        for name, layer in bora_layers(model).items():
            W0, merged = weights[name]
            torch.testing.assert_close(layer.effective_weight("default"), W0 + scale * (merged - W0))
        scaled = outputs(model, TOKENS)
        if scale == 0:
            torch.testing.assert_close(scaled, start, rtol=1e-5, atol=1e-6)
        else:
            assert not torch.allclose(scaled, full, rtol=0.1, atol=0.1)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, TOKENS), scaled, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        for layer in bora_layers(model).values():
            layer.set_scale("default", 1.0)
        del held
        assert torch.equal(outputs(model, TOKENS), full)


def test_scaled_half_precision_layers_merge_with_dither():
    torch.manual_seed(0)
    model = make_peft(nn.ModuleDict({"layer": nn.Linear(64, 64).bfloat16()}), target_modules=["layer"])
    layer = next(iter(bora_layers(model).values()))
    whole = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * whole)
    found = layer.effective_weight("default").float() - layer.base_layer.weight.float()
    assert layer.effective_weight("default").dtype == torch.bfloat16
    torch.testing.assert_close(found, 0.5 * whole, rtol=2**-7, atol=2**-9)
