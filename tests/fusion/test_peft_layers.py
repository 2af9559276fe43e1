"""PEFT's own LoRA and DoRA layers after ``fuse``: the same results on other kernels, whatever comes later."""

import pytest
import torch
from helpers.fused_models import (
    adapters_that_run,
    assert_close,
    assert_same_results,
    peft_model,
    results,
    twins,
    variants,
)
from helpers.peft_models import make_base, make_ids, train_a_little
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bora_kernels import fuse  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    return adapters_that_run(monkeypatch)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@variants
def test_results_are_those_of_peft(variant, kind, calls):
    fused, plain = twins(peft_model(variant, kind))
    assert_same_results(fused, plain)
    assert calls and all((adapter.magnitude_row is not None) == (variant == "dora") for adapter in calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@variants
def test_a_half_precision_base(variant, dtype, calls):
    fused, plain = twins(peft_model(variant, base=make_base().to(dtype)))
    assert fused.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32
    assert_same_results(fused, plain)
    assert len(calls) == 14


@variants
def test_adapters_as_narrow_as_the_base(variant):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=variant == "dora")
    model = peft.get_peft_model(make_base().bfloat16(), config, autocast_adapter_dtype=False)
    assert_same_results(*twins(train_a_little(model)))


@variants
def test_autocast(variant, calls):
    fused, plain = twins(peft_model(variant))

    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype != torch.float64):
            return results(model)

    assert_same_results(fused, plain, run)
    assert len(calls) == 14


def test_biases_ranks_and_scalings_of_their_own():
    options = {"rank_pattern": {"q_proj": 1, "down_proj": 7}, "alpha_pattern": {"v_proj": 1}, "use_rslora": True}
    model = peft_model(base=make_base(attention_bias=True, mlp_bias=True), bias="all", **options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    assert_same_results(*twins(model))


def add_second(model):
    torch.manual_seed(3)
    model.add_adapter("second", peft.LoraConfig(r=5, target_modules=["q_proj", "up_proj"]))
    train_a_little(model, "second", seed=7)


def only_second(model):
    add_second(model)
    model.set_adapter("second")


def both(model):
    add_second(model)
    model.base_model.set_adapter(["default", "second"])


def delete(model):
    add_second(model)
    model.delete_adapter("default")
    model.set_adapter("second")


def scale(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)


def merge_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def train_the_base(model):
    for name, parameter in model.named_parameters():
        if "base_layer.weight" in name:
            parameter.requires_grad_()


def replace_a_layer(model):
    mlp = model.base_model.model.model.layers[0].mlp
    torch.manual_seed(4)
    mlp.up_proj = nn.Linear(32, 48, bias=False)


def no_casts(model):
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


CHANGES = [add_second, only_second, both, delete, scale, merge_and_back, train_the_base, replace_a_layer, no_casts]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@variants
def test_what_happens_to_adapters_later(variant, change):
    fused, plain = twins(peft_model(variant))
    results(fused)
    for model in (fused, plain):
        change(model)
    assert_same_results(fused, plain)


@variants
def test_disabled_merged_and_unloaded(variant, calls):
    fused, plain = twins(peft_model(variant))
    with fused.disable_adapter(), plain.disable_adapter():
        assert_close(fused, plain)
    for model in (fused, plain):
        model.merge_adapter()
    assert_close(fused, plain)
    for model in (fused, plain):
        model.unmerge_adapter()
    assert not calls
    assert_same_results(fused, plain)
    assert calls
    assert_close(fused.merge_and_unload(), plain.merge_and_unload())


def test_an_adapter_for_each_sequence_of_a_batch():
    fused, plain = twins(peft_model())
    for model in (fused, plain):
        add_second(model)
        model.eval()
    names = ["default", "second", "__base__"]
    with torch.no_grad():
        found, expected = (m(input_ids=make_ids(), adapter_names=names).logits for m in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_hooks_on_parts_of_a_layer_are_called(part):
    fused, plain = twins(peft_model())
    for model in (fused, plain):
        layer = model.base_model.model.model.layers[1].self_attn.o_proj
        layer.get_submodule(part).register_forward_hook(lambda module, args, y: 2 * y)
    assert_same_results(fused, plain)


def test_hooks_on_the_layer_and_on_all_modules_are_called():
    fused, plain = twins(peft_model())
    for model in (fused, plain):
        model.base_model.model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda module, args: 2 * args[0])
    assert_same_results(fused, plain)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        results(fused)
    finally:
        handle.remove()
    assert fused.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"] in seen


def test_lora_with_dropout_is_right_on_average(calls):
    fused, plain = twins(peft_model(lora_dropout=0.4).eval())
    layer = fused.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(6, 32)
    with torch.no_grad():
        expected = plain.base_model.model.model.layers[0].mlp.up_proj(x)
        frozen = layer.base_layer(x)
        layer.train()
        draws = torch.stack([layer(x) for _ in range(3000)])
    assert len(calls) == 3000 and draws.std(0).min() > 0
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / 3000**0.5)
    assert error.max() < 5 and (expected - frozen).abs().max() > 0.1


def test_dora_with_dropout_is_left_to_peft(calls):
    fused, plain = twins(peft_model("dora", lora_dropout=0.4).train())
    assert_close(fused, plain)
    assert not calls
    fused.eval(), plain.eval()
    assert_same_results(fused, plain)
    assert calls


def test_a_bias_of_the_adapter_is_left_to_peft(calls):
    model = peft_model(target_modules=["q_proj", "o_proj"], lora_bias=True, base=make_base(attention_bias=True))
    assert_close(*twins(model))
    assert not calls


def test_a_row_of_zeros_gives_zeros_where_peft_gives_nan():
    base = make_base()
    base.model.layers[0].self_attn.o_proj.weight.data[3] = 0
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], use_dora=True)
    fused, plain = twins(peft.get_peft_model(base, config))
    assert results(plain)["logits"].isnan().any() and not results(fused)["logits"].isnan().any()


@variants
def test_files_and_names_stay_those_of_peft(variant, tmp_path):
    fused, plain = twins(peft_model(variant))
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    for name, model in (("fused", fused), ("plain", plain)):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("fused", "plain")]
    assert files[0] == files[1]
    assert_same_results(fuse(peft.PeftModel.from_pretrained(make_base(), tmp_path / "fused", is_trainable=True)), plain)


@pytest.mark.sampled(2)
@variants
def test_compiled_to_one_graph(variant, calls):
    torch._dynamo.reset()
    fused, plain = twins(peft_model(variant, base=make_base(num_hidden_layers=1)))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    found, expected = results(compiled), results(fused)
    assert [name for name in expected if name not in {n.replace("_orig_mod.", "") for n in found}] == []
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name.replace("_orig_mod.", "")], rtol=1e-4, atol=1e-5)
    with fused.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(compiled(make_ids()).logits, plain(make_ids()).logits)


@pytest.mark.parametrize("transform", ["func", "trace", "forward_mode"])
def test_transforms_and_tracers_have_peft_s_operations(transform):
    fused, plain = twins(peft_model())
    x = torch.randn(4, 32)
    found, expected = (
        _transformed(transform, m.base_model.model.model.layers[0].mlp.up_proj, x) for m in (fused, plain)
    )
    assert torch.equal(found, expected)


def _transformed(transform, layer, x):
    if transform == "func":
        return torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)
    if transform == "trace":
        return torch.jit.trace(layer, (x,))(2 * x)
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, x.cos()))).tangent
