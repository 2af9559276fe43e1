"""Layers that read one input, in models: what may happen between two of their calls."""

import copy

import pytest
import torch
from helpers.fused_models import blocks_that_run, converted, peft_model, twins
from torch import nn

from bora_kernels import fuse, unfuse
from bora_kernels.fusion import shared
from bora_kernels.fusion.install import install


@pytest.fixture
def calls(monkeypatch):
    return blocks_that_run(monkeypatch)


class Attention(nn.Module):
    """Three layers on x, with something in between that a test may set."""

    between = None

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(20, 18), nn.Linear(20, 18), nn.Linear(20, 18, bias=False)

    def forward(self, x):
        q = self.q(x)
        if self.between is not None:
            self.between(x)
        k = self.k(x)
        return q, k, self.v(x)


def attention():
    torch.manual_seed(0)
    return converted(Attention(), target_modules=["q", "k", "v"])


def both(module, x):
    fused, plain = twins(module)
    return fused, *(m(x.clone().requires_grad_() * 1) for m in (fused, plain))


def test_a_change_of_x_between_two_calls_is_seen(calls):
    module = attention()
    module.between = lambda x: x.detach().add_(1)
    _, found, expected = both(module, torch.randn(4, 20))
    for y, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(y, wanted)
    assert calls["shared_input"] == 2  # for q, and again for k and v


def test_other_circumstances_between_two_calls_are_seen():
    class Half(Attention):
        def forward(self, x):
            q = self.q(x)
            with torch.no_grad():
                k = self.k(x)
            with torch.autocast("cpu", torch.bfloat16):
                return q, k, self.v(x)

    torch.manual_seed(0)
    fused, found, expected = both(converted(Half(), target_modules=["q", "k", "v"]), torch.randn(4, 20))
    # the source says that these are no group; make one
    unfuse(fused)
    group = shared.Group((fused.q, fused.k, fused.v))
    for index, member in enumerate(group.layers):
        install(member, shared.shared_layer, group, index)
    found = fused(torch.randn(4, 20).requires_grad_() * 1)
    assert found[0].requires_grad and not found[1].requires_grad and found[2].dtype == torch.bfloat16


def test_a_call_that_fails_half_way_leaves_nothing_wrong():
    module = attention()
    fused, plain = twins(module)
    x = torch.randn(4, 20)

    def fail(x):
        raise KeyboardInterrupt

    fused.between = fail
    with pytest.raises(KeyboardInterrupt):
        fused(x)
    fused.between = None
    with torch.no_grad():
        for m in (fused, plain):
            m.k.lora_B.mul_(3)
    for y, wanted in zip(fused(x), plain(x), strict=True):
        torch.testing.assert_close(y, wanted)


def test_another_thread_may_call_in_between(monkeypatch):
    fused, plain = twins(attention())
    x, other = torch.randn(4, 20), torch.randn(4, 20)
    inner, armed = shared._state, [False]

    def interrupted(tensor):
        """As if another thread came to the same layers while this one looks at what is ready."""
        if armed[0]:
            armed[0] = False
            fused.q(other)
        return inner(tensor)

    monkeypatch.setattr(shared, "_state", interrupted)
    fused.between = lambda _: armed.__setitem__(0, True)
    for y, wanted in zip(fused(x), plain(x), strict=True):
        torch.testing.assert_close(y, wanted)
    assert not armed[0]


def test_nothing_is_left_ready_and_copies_begin_anew():
    fused = fuse(attention())
    group = fused.q.forward.args[1]
    fused(torch.randn(4, 20))
    assert group.ready is None
    fused.between = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fused(torch.randn(4, 20))
    assert group.ready is not None and not group.ready.outputs.keys() - {1, 2}
    twin = copy.deepcopy(fused)
    assert twin.q.forward.args[1].layers[1] is twin.k and twin.q.forward.args[1].ready is None


@pytest.mark.parametrize("kind", ["converted", "lora", "dora"])
def test_an_output_that_nobody_took_is_not_given_after_a_change(kind):
    """q is called by itself, an adapter is changed or switched, and k is asked for the same x."""

    def changed(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.3)

    def scaled(model):
        for module in model.modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict):
                scaling["default"] *= 3
            elif scaling is not None:
                module.scaling = 3 * scaling

    def disabled(model):
        model.base_model.disable_adapter_layers()

    for change in (changed, scaled) if kind == "converted" else (changed, scaled, disabled):
        model, plain = twins(converted() if kind == "converted" else peft_model(kind))
        blocks = [
            next(m for n, m in each.named_modules() if n.endswith("layers.0.self_attn")) for each in (model, plain)
        ]
        x = torch.randn(2, 3, blocks[0].q_proj.in_features)
        outputs = [block.v_proj(x) for block in blocks]
        for each, block in zip((model, plain), blocks, strict=True):
            block.q_proj(x)
            change(each)
        found, expected = (block.k_proj(x) for block in blocks)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
