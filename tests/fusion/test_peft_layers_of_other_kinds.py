"""PEFT's own layers after ``fuse``: what is left to PEFT, what ``explain`` says, quantized bases, other models."""

import copy

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.fused_models import (
    VARIANTS,
    adapters_that_run,
    assert_close,
    assert_same_results,
    peft_model,
    twins,
    variants,
)
from helpers.peft_models import train_a_little
from helpers.quantized_layers import quantized_linear
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bora_kernels import explain, fuse, unfuse  # noqa: E402
from bora_kernels.quantized import read  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    return adapters_that_run(monkeypatch)


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
