"""Fused models into whose modules other libraries put their forwards, before or afterwards."""

import types

import pytest
import torch
import torch.nn.functional as F
from helpers.fused_models import assert_same_results, blocks_that_run, converted, twins
from helpers.peft_models import make_base

from bora_kernels import explain, unfuse


@pytest.fixture
def calls(monkeypatch):
    return blocks_that_run(monkeypatch)


def layer(model, number=0):
    return (model.base_model.model if hasattr(model, "peft_config") else model).model.layers[number]


def patched_forward(self, x):
    """What a library of kernels binds to a module in the place of its forward."""
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def test_forwards_that_were_bound_before_are_left_out_with_a_sentence(calls):
    model = converted()
    for block in model.model.layers:
        block.mlp.forward = types.MethodType(patched_forward, block.mlp)
        norm = block.input_layernorm
        norm.forward = types.MethodType(_scaled_norm, norm)
    fused, plain = twins(model)
    left_out = dict(explain(fused).not_fused)
    assert left_out["model.layers.0.mlp"] == left_out["model.layers.1.input_layernorm"]
    assert left_out["model.layers.0.mlp"] == "someone else has put another forward into it"
    assert_same_results(fused, plain)
    assert calls["gated_mlp"] == 0 and calls["shared_input"] == 4  # q, k, v and gate, up
    unfuse(fused)
    assert all("forward" in block.mlp.__dict__ for block in fused.model.layers)


def _scaled_norm(self, x):
    return 2 * type(self).forward(self, x)


def test_forwards_that_are_bound_afterwards_win():
    fused, plain = twins(converted())
    for model in (fused, plain):
        model.model.layers[0].mlp.forward = types.MethodType(
            lambda self, x: 2 * patched_forward(self, x), layer(model).mlp
        )
    assert_same_results(fused, plain)
    assert "model.layers.0.mlp" not in [part.name for part in explain(fused).fused]


class _SiLUMul(torch.autograd.Function):
    """As kernels for a gated MLP are wrapped."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dc * b, a), F.silu(a) * dc


def test_classes_with_kernels_of_their_own_are_recognized_by_what_they_compute(calls):
    class KernelMLP(type(make_base().model.layers[0].mlp)):
        def forward(self, x):
            return self.down_proj(_SiLUMul.apply(self.gate_proj(x), self.up_proj(x)))

    base = make_base()
    for block in base.model.layers:
        block.mlp.__class__ = KernelMLP
    assert_same_results(*twins(converted(base)))
    assert calls["gated_mlp"] == 2


def test_a_class_s_forward_that_is_patched_later_is_seen(monkeypatch, calls):
    fused, plain = twins(converted())
    kind = type(layer(fused).mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: 3 * patched_forward(self, x))
    assert_same_results(fused, plain)
    assert calls["gated_mlp"] == 0
