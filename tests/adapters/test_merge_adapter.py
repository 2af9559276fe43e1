"""Models whose adapter is merged: plain ones, with a sentence about what is shared."""

import pytest
import torch
from helpers.adapted_models import K, Model, X, methods, trained
from torch import nn

from bora_kernels import convert, load_adapter, merge_adapter, save_adapter
from bora_kernels.adapters.conversion import adapted_layers

safetensors = pytest.importorskip("safetensors.torch", reason="adapter files need safetensors")


@methods
def test_merged_model_is_plain(method):
    model = trained(method=method, dtype=torch.bfloat16, head=True)
    weights = {name: layer.effective_weight() for name, layer in adapted_layers(model).items()}
    y = model(X.bfloat16())
    head = model.head
    assert merge_adapter(model) is model
    assert not adapted_layers(model) and model.again is model.block["down"] and model.head is head
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is nn.Linear and torch.equal(model.get_submodule(name).weight, weight)
    torch.testing.assert_close(model(X.bfloat16()), y, rtol=0.02, atol=0.02)


def test_merging_a_tied_weight_says_so():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, K), "lm_head": nn.Linear(K, 5, bias=False)})
    model["lm_head"].weight = model["embedding"].weight
    before = model["embedding"].weight.clone()
    convert(model, target_modules=["lm_head"])
    nn.init.normal_(model["lm_head"].lora_B)
    with pytest.warns(UserWarning, match="lm_head shared its weight with embedding and no longer does"):
        merge_adapter(model)
    assert torch.equal(model["embedding"].weight, before) and not torch.equal(model["lm_head"].weight, before)


def test_two_adapters_for_one_shared_layer_are_refused(tmp_path):
    model = convert(Model(shared=False), r=2, target_modules=["down", "again"])
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="must fit the model: block.down is the same layer as again"):
        load_adapter(Model(), tmp_path)
