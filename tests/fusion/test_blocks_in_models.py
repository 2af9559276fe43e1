"""Blocks in models: what sends a call to the plain forward, and what may happen around one."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from helpers.fused_models import assert_close, assert_same_results, results, twins
from helpers.peft_models import make_base, make_ids, make_peft, train_a_little
from torch import nn

from bora_kernels import FusedBoraLinear, convert, explain, fuse, unfuse
from bora_kernels.fusion import mlp, normed, shared
from bora_kernels.fusion.install import install

FUSED_CALLS = [(mlp, "gated_mlp"), (shared, "shared_input"), (normed, "rms_norm")]


@pytest.fixture
def calls(monkeypatch):
    made = {name: 0 for _, name in FUSED_CALLS}

    def counting(place, name):
        inner = getattr(place, name)

        def call(*args):
            made[name] += 1
            return inner(*args)

        monkeypatch.setattr(place, name, call)

    for place, name in FUSED_CALLS:
        counting(place, name)
    return made


def converted(base=None, **options):
    """A Llama of two layers, converted and off its start."""
    model = convert(make_base() if base is None else base, **{"r": 3, "alpha": 5, **options})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                change = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + 0.1 * change) if parameter.ndim == 1 else parameter + 0.1 * change)
    return model


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


# --- layers that read one input --------------------------------------------------------------------------------------


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


# --- other libraries' forwards ---------------------------------------------------------------------------------------


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
