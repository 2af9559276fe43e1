"""PEFT's own LoRA and DoRA layers after ``fuse``: the same results on other kernels, whatever comes later."""

import copy

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.fused_models import VARIANTS, assert_close, assert_same_results, peft_model, results, twins, variants
from helpers.peft_models import make_base, make_ids, train_a_little
from helpers.quantized_layers import quantized_linear
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bora_kernels import explain, fuse, unfuse  # noqa: E402
from bora_kernels.fusion import layers, mlp, shared  # noqa: E402
from bora_kernels.quantized import read  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """The adapters that ran on this package's kernels, alone or in a block."""
    made = []

    def counting(place, name, adapters):
        inner = getattr(place, name)

        def call(*args):
            made.extend(adapters(*args))
            return inner(*args)

        monkeypatch.setattr(place, name, call)

    counting(layers, "adapted_linear", lambda x, weight, adapter, *_: [adapter])
    counting(mlp, "gated_mlp", lambda x, *members: [member.adapter for member in members[:3]])
    counting(shared, "shared_input", lambda x, members, origin: [member.adapter for member in members])
    return made


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


def test_other_kinds_of_layers_are_left_to_peft_and_explained():
    fused, plain = twins(peft_model(target_modules=["q_proj", "embed_tokens"]))
    assert_same_results(fused, plain)
    told = str(explain(fused))
    assert "base_model.model.model.layers.*.self_attn.q_proj  2× PEFT layer\n" in told
    assert (
        "not fused: base_model.model.model.embed_tokens  1×: its class, peft.tuners.lora.layer.Embedding, is not known"
        in told
    )


def test_explain_says_what_a_call_would_do_now():
    model = fuse(peft_model())
    assert not [part for part in explain(model).fused if part.problem]
    with model.disable_adapter():
        problems = {part.problem for part in explain(model).fused if part.kind != "RMSNorm"}
        assert problems == {"its adapters are disabled", "gate_proj: its adapters are disabled"}
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(lambda *_: None)
    problems = [(part.name, part.problem) for part in explain(model).fused if part.problem]
    name, reason = "base_model.model.model.layers.0.mlp", "a hook or another forward waits for the call of a part of it"
    assert problems == [(name, f"up_proj: {reason}"), (f"{name}.gate_proj", reason), (f"{name}.up_proj", reason)]


@variants
def test_unfuse_gives_the_model_back(variant, calls):
    model = peft_model(variant)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    plain = copy.deepcopy(model)
    unfuse(fuse(model))
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert_close(model, plain)
    assert not calls


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)
        self.is_loaded_in_4bit = True

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def quantized_model(kind, variant, *, dense=False):
    """A model over an NF4 base; ``dense`` with the same weights dequantized, in float64."""
    torch.manual_seed(0)
    model = Quantizable().bfloat16()
    for name in ("first", "second"):
        linear = getattr(model, name)
        stored = quantized_linear(kind, linear.weight.detach(), linear.bias.detach(), compute_dtype=torch.bfloat16)
        linear.weight = nn.Parameter(read(stored).dense(torch.float64), requires_grad=False)
        setattr(model, name, linear if dense else stored)
    config = peft.LoraConfig(r=4, target_modules=["first", "second"], **VARIANTS[variant])
    model.is_loaded_in_4bit = not dense
    torch.manual_seed(1)
    model = train_a_little(peft.get_peft_model(model, config))
    return model.double() if dense else model


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4"])
@variants
def test_a_base_in_4_bits(kind, variant, calls):
    def run(model):
        model.zero_grad()
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
        x = x.to(torch.float64 if model.is_exact else torch.bfloat16).requires_grad_()
        y = model(x)
        y.double().square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "dx": x.grad, **gradients}

    fused, plain = fuse(quantized_model(kind, variant)), quantized_model(kind, variant)
    exact = quantized_model(kind, variant, dense=True)
    fused.is_exact = plain.is_exact = False
    exact.is_exact = True
    assert type(plain.base_model.model.first).__name__ == "Linear4bit"
    exact.load_state_dict({n: t for n, t in plain.state_dict().items() if "lora_" in n}, strict=False)
    assert_accurate(run(fused), run(plain), {n: t.double() for n, t in run(exact).items()}, samples=16)
    assert len(calls) == 2


def test_a_base_in_8_bits_is_left_to_peft():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear8bitLt(32, 16, has_fp16_weights=False).to("cpu"))
    model.is_loaded_in_8bit = True
    model = fuse(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])))
    assert explain(model).not_fused == (
        ("base_model.model.0", "its class, peft.tuners.lora.bnb.Linear8bitLt, is not known"),
    )


def test_falcon_s_linear_layers(calls):
    torch.manual_seed(0)
    base = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    )
    assert_same_results(*twins(peft_model(base=base)))
    assert len(calls) == 4
