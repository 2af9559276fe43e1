"""The life of BoRA adapters in PEFT: several at once, merged and unmerged."""

import copy

import pytest
import torch
from helpers.accuracy import assert_equal
from helpers.cases import HALVES, NAMES, orders
from helpers.peft_models import (
    MODELS,
    bora_layers,
    dense_twin,
    make_base,
    make_ids,
    make_peft,
    train_a_little,
)
from torch import nn

peft = pytest.importorskip("peft")
from peft import PeftModel  # noqa: E402

from bora_kernels import convert  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402
from bora_kernels.reference import bora_weight_ref  # noqa: E402

models = pytest.mark.parametrize("kind", MODELS)
safe = pytest.mark.parametrize("safe_merge", [False, True], ids=["plain", "safe"])


def logits(model):
    with torch.no_grad():
        return model(make_ids()).logits


def base_weights(model):
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in bora_layers(model).items()}


# ---- several adapters ----


def test_adapters_are_added_switched_disabled_and_deleted():
    base = make_base()
    start = logits(base)
    model = make_peft(base)
    first = logits(model)
    model.add_adapter("other", BoraConfig(r=2, target_modules=["q_proj", "lm_head"], norm_order="col_row"))
    assert torch.equal(logits(model), first)
    train_a_little(model, "other", seed=7)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(second, first, rtol=1e-2, atol=1e-2)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    assert torch.equal(logits(model), second)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), first)
    assert not any("other" in name for name in model.state_dict())
    assert torch.equal(logits(model.unload()), start)


def test_adapters_of_both_kinds_live_side_by_side():
    model = make_peft(make_base())
    first = logits(model)
    model.add_adapter("dora", BoraConfig(r=2, target_modules="all-linear", use_dora=True))
    train_a_little(model, "dora", seed=7)
    model.set_adapter("dora")
    layer = next(iter(bora_layers(model).values()))
    assert set(layer.lora_magnitude_vector_row) == {"default", "dora"}
    assert set(layer.lora_magnitude_vector_col) == {"default"}
    second = logits(model)
    assert not torch.allclose(first, second, rtol=1e-2, atol=1e-2)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


# ---- merging ----


@models
@orders
@safe
def test_merged_weights_are_those_of_the_reference(kind, order, safe_merge):
    base = make_base(kind)
    model = make_peft(copy.deepcopy(base), norm_order=order)
    expected, before = logits(model), base_weights(model)
    twins = dense_twin(base, model).double()
    model.merge_adapter(safe_merge=safe_merge)
    for name, layer in bora_layers(model).items():
        dense = twins.get_submodule(name.removeprefix("base_model.model."))
        factors = (dense.lora_A, dense.lora_B, dense.lora_magnitude_vector_row, dense.lora_magnitude_vector_col)
        exact = bora_weight_ref(dense.weight, *factors, scaling=dense.scaling, norm_order=order)
        merged = layer.get_base_layer().weight
        exact = exact.T if kind == "gpt2" else exact
        torch.testing.assert_close(merged.double(), exact, rtol=2e-6, atol=1e-7)
        assert merged.is_contiguous()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_equal(base_weights(model), before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=NAMES.get)
@pytest.mark.slow
def test_a_thousand_merges_leave_the_base_weights_to_the_bit(dtype, tmp_path):
    base = make_base(num_hidden_layers=1).to(dtype)
    model = make_peft(base, target_modules=["q_proj", "embed_tokens"])
    before, expected = base_weights(model), logits(model)
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_equal(base_weights(model), before)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    fresh = make_base(num_hidden_layers=1).to(dtype)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path)), expected)


@models
@safe
def test_merge_and_unload_leaves_a_plain_model(kind, safe_merge):
    base = make_base(kind)
    types = [type(module) for module in base.modules()]
    model = make_peft(base)
    expected = logits(model)
    plain = model.merge_and_unload(safe_merge=safe_merge)
    assert [type(module) for module in plain.modules()] == types
    assert all("lora" not in name and "unmerged" not in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


def test_adapters_are_added_to_a_merged_model():
    """They start from W0, not from the merged weight; those that would change W0 are refused."""
    base = make_base()
    start = logits(base)
    model = make_peft(base)
    expected = logits(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes base weights, and .*q_proj is merged"):
        model.add_adapter("third", BoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    assert set(model.peft_config) == {"default"}
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", BoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(logits(model), expected)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), start, rtol=1e-5, atol=1e-5)


def test_replicated_layers_share_weights_and_have_adapters_of_their_own():
    base = make_base()
    before = base.state_dict()["model.layers.1.self_attn.q_proj.weight"].clone()
    model = make_peft(base, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    assert len(bora_layers(model)) == 3
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    layers = [layer.get_base_layer().weight for layer in bora_layers(model).values()]
    assert torch.equal(layers[1], before) and torch.equal(layers[2], before)


def test_a_broken_adapter_is_not_merged_safely():
    model = make_peft(make_base())
    layer = bora_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        layer.lora_magnitude_vector_row["default"].weight[0] = float("nan")
    before = base_weights(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert_equal(base_weights(model), before)


def test_a_merged_model_moves_and_unmerges_in_another_dtype():
    model = make_peft(make_base())
    before = base_weights(model)
    model.merge_adapter()
    copied = copy.deepcopy(model).double()
    copied.unmerge_adapter()
    assert all(torch.equal(weight, before[name].double()) for name, weight in base_weights(copied).items())
    assert next(iter(bora_layers(model).values())).merged


def test_merging_does_not_change_a_weight_that_is_shared():
    base = make_base(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = make_peft(base, target_modules=["lm_head", "q_proj"])
    expected, embeddings = logits(model), base.model.embed_tokens.weight.detach().clone()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(base.model.embed_tokens.weight, embeddings)
    model.unmerge_adapter()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_copy_of_a_merged_model_is_tied_to_nothing_of_the_original(dtype):
    base = make_base(tie_word_embeddings=True)
    model = make_peft(base, target_modules=["lm_head"])
    expected = logits(model)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    twin = copy.deepcopy(model).to(dtype)
    twin.unmerge_adapter()
    inside = twin.get_base_model()
    assert inside.lm_head.base_layer.weight is not base.model.embed_tokens.weight
    assert inside.lm_head.base_layer.weight.dtype == inside.model.embed_tokens.weight.dtype
    with torch.no_grad():
        inside.lm_head.base_layer.weight.zero_()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("way", ["convert", "peft"])
def test_what_was_merged_in_inference_mode_runs_where_gradients_are_recorded(way):
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
    model = convert(base, r=2) if way == "convert" else make_peft(base, target_modules=["0", "2"])
    layer = base[2]
    with torch.inference_mode():
        layer.merge()
    x = torch.randn(3, 6)
    model(x).sum().backward()
    assert base[0].lora_B.grad.any() if way == "convert" else base[0].lora_B.default.weight.grad.any()
    with torch.inference_mode():
        layer.unmerge()
    model(x).sum().backward()
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


def test_a_module_that_is_used_twice_is_adapted_once():
    shared = nn.Linear(8, 8)
    base = nn.ModuleDict({"first": shared, "second": shared})
    model = make_peft(base, target_modules=["first", "second"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    x = torch.randn(2, 8)
    outputs = [model.base_model.model[name](x) for name in ("first", "second")]
    assert len(trained) == 4 * len(bora_layers(model)) and all(y.isfinite().all() for y in outputs)


def test_delta_weight_is_what_the_adapter_adds():
    model = make_peft(make_base("gpt2").bfloat16())
    layer = next(iter(bora_layers(model).values()))
    delta, weight = layer.get_delta_weight("default"), layer.get_base_layer().weight
    assert delta.dtype == torch.float32 and delta.shape == weight.shape
    torch.testing.assert_close(
        (weight.float() + delta).bfloat16(), layer.effective_weight("default"), rtol=0.01, atol=0
    )
    assert delta.abs().max() > 0.01
