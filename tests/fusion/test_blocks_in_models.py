"""Blocks in models: what sends a call to the plain forward, and what may happen around one."""

import copy
import types

import pytest
import torch
from helpers.fused_models import assert_close, assert_same_results, blocks_that_run, converted, results, twins
from helpers.peft_models import make_base, make_ids, make_peft, train_a_little
from torch import nn

from bora_kernels import FusedBoraLinear, explain, fuse


@pytest.fixture
def calls(monkeypatch):
    return blocks_that_run(monkeypatch)


def layer(model, number=0):
    return (model.base_model.model if hasattr(model, "peft_config") else model).model.layers[number]


def double(module, args, y):
    return 2 * y


CHANGES = {
    "hook on down": lambda m: layer(m).mlp.down_proj.register_forward_hook(double),
    "hook on gate": lambda m: layer(m).mlp.gate_proj.register_forward_hook(double),
    "hook on the activation": lambda m: layer(m).mlp.act_fn.register_forward_hook(double),
    "backward hook on up": lambda m: layer(m).mlp.up_proj.register_full_backward_hook(lambda m, dx, dy: (2 * dx[0],)),
    "another activation": lambda m: setattr(layer(m).mlp, "act_fn", nn.ReLU()),
    "another forward": lambda m: _patch(layer(m).mlp.up_proj),
    "a plain layer": lambda m: setattr(layer(m).mlp, "down_proj", _linear(48, 32)),
    "another rank": lambda m: setattr(layer(m).mlp, "up_proj", FusedBoraLinear.from_linear(_linear(32, 48), r=9)),
    "merged": lambda m: layer(m).mlp.gate_proj.merge(),
    "merged in attention": lambda m: layer(m).self_attn.k_proj.merge(),
    "trained base": lambda m: setattr(layer(m).mlp.down_proj, "weight", nn.Parameter(torch.ones(32, 48)))
    or layer(m).mlp.down_proj.weight.requires_grad_(False),
    "hook on k": lambda m: layer(m).self_attn.k_proj.register_forward_hook(double),
    "pre-hook on v": lambda m: layer(m).self_attn.v_proj.register_forward_pre_hook(lambda m, args: 2 * args[0]),
    "hook on a norm": lambda m: layer(m).input_layernorm.register_forward_hook(double),
    "in-place hook on a norm": lambda m: layer(m).input_layernorm.register_forward_hook(lambda m, a, y: y.mul_(2)),
    "trained norm": lambda m: layer(m).post_attention_layernorm.weight.requires_grad_(),
    "another eps": lambda m: setattr(layer(m).input_layernorm, "variance_epsilon", 0.5),
    "reference": lambda m: setattr(layer(m).mlp.up_proj, "backend", "reference"),
}  # fmt: skip


def _linear(n_in, n_out):
    torch.manual_seed(5)
    return nn.Linear(n_in, n_out, bias=False).requires_grad_(False)


def _patch(module):
    module.forward = types.MethodType(lambda self, x: 3 * type(self).forward(self, x), module)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_fuse_is_followed(change):
    fused, plain = twins(converted())
    for model in (fused, plain):
        CHANGES[change](model)
    assert_same_results(fused, plain)


@pytest.mark.parametrize("name", ["down_proj", "act_fn"])
def test_a_hook_that_is_there_before(name, calls):
    model = converted()
    seen = []
    layer(model).mlp.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
    fused = fuse(model)
    told = explain(fused)
    problems = [part.problem for part in told.fused if part.kind == "gated MLP" and part.problem]
    (problem,) = problems + [reason for _, reason in told.not_fused]
    assert name in problem and "a hook or another forward waits for" in problem and not seen
    results(fused)
    assert len(seen) == 1 and calls["gated_mlp"] == 1  # the other MLP


def test_dropout_of_adapters_is_left_to_the_layers(calls):
    fused, plain = twins(converted(dropout=0.3).train())
    assert_close(fused, plain)
    assert not calls["gated_mlp"] and not calls["shared_input"]
    fused.eval(), plain.eval()
    assert_same_results(fused, plain)
    assert calls["gated_mlp"] and calls["shared_input"]


@pytest.mark.parametrize("grad", ["no_grad", "inference_mode"])
def test_evaluation(grad, calls):
    fused, plain = twins(converted())
    with getattr(torch, grad)():
        torch.testing.assert_close(fused(make_ids()).logits, plain(make_ids()).logits, rtol=1e-4, atol=1e-5)
    assert calls["gated_mlp"] == 2 and calls["shared_input"] == (2 if grad == "no_grad" else 0)
    assert_same_results(fused, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, calls):
    fused, plain = twins(converted())
    for model in (fused, plain):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_same_results(fused, plain)
    assert calls["gated_mlp"] == calls["shared_input"] == 4  # forward and again


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", ["convert", "peft"])
def test_compiled_to_one_graph(way):
    torch._dynamo.reset()
    fused, plain = twins((converted if way == "convert" else make_peft)(make_base(num_hidden_layers=1)))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    expected, found = results(plain), results(compiled)
    assert len(found) == len(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name.replace("_orig_mod.", "")], rtol=1e-3, atol=1e-5)


def test_generate(calls):
    fused, plain = twins(converted())
    expected, found = (
        m.generate(input_ids=make_ids(), max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (plain, fused)
    )
    assert torch.equal(found, expected) and calls["gated_mlp"] == 12


def test_adapters_of_peft_come_and_go(calls):
    fused, plain = twins(make_peft(make_base()))
    with fused.disable_adapter(), plain.disable_adapter():
        assert_close(fused, plain)
    assert not calls["gated_mlp"] and not calls["shared_input"]
    for model in (fused, plain):
        torch.manual_seed(7)
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        train_a_little(model, "second", seed=4)
        model.set_adapter("second")
    assert_same_results(fused, plain)
    assert calls["gated_mlp"] and calls["shared_input"]
    for model in (fused, plain):
        model.merge_adapter()
    assert_close(fused, plain)
