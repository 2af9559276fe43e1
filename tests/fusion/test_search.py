"""What ``fuse`` finds by structure: gated MLPs by stubs, readers of one input in a forward's source."""

import copy
import importlib
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bora_kernels import convert
from bora_kernels.fusion.readers import shared_inputs
from bora_kernels.fusion.search import GatedMLP, gated_mlp

K, I = 12, 20
NOT_THE_PRODUCT = "what its forward calls down with is not act(gate)⊙up with act SiLU, GELU or tanh-GELU"


class MLP(nn.Module):
    def __init__(self, act=F.silu, bias=False):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(K, I, bias), nn.Linear(K, I, bias), nn.Linear(I, K, bias)
        self.act = act

    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x))


GELU_NEW = lambda t: 0.5 * t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3)))  # noqa: E731


@pytest.mark.parametrize(
    "act, name",
    [(F.silu, "silu"), (nn.SiLU(), "silu"), (F.gelu, "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (GELU_NEW, "gelu_tanh")],
)
def test_activations(act, name):
    assert gated_mlp(MLP(act)) == GatedMLP("a", "b", "c", name, False)


def test_gate_and_up_by_what_they_do():
    class Swapped(MLP):
        def forward(self, x):
            up = self.a(x)
            return self.c(up * self.act(self.b(x)))

    assert gated_mlp(Swapped()) == GatedMLP("b", "a", "c", "silu", False)


class Joint(nn.Module):
    def __init__(self, gate_first=True, act=F.silu, N=K):
        super().__init__()
        self.w, self.c = nn.Linear(K, 2 * I), nn.Linear(I, N)
        self.gate_first, self.act = gate_first, act

    def forward(self, x):
        first, second = self.w(x).chunk(2, dim=-1)
        return self.c(self.act(first) * second if self.gate_first else first * self.act(second))


@pytest.mark.parametrize("gate_first", [True, False])
def test_one_layer_for_gate_and_up(gate_first):
    assert gated_mlp(Joint(gate_first, F.gelu)) == GatedMLP("w", "w", "c", "gelu", False, gate_first)
    with torch.no_grad():
        assert gated_mlp(Joint(gate_first, F.gelu, N=7)) == GatedMLP("w", "w", "c", "gelu", False, gate_first)


def test_one_layer_whose_halves_are_something_else():
    class Interleaved(Joint):
        def forward(self, x):
            both = self.w(x)
            return self.c(self.act(both[..., ::2]) * both[..., 1::2])

    assert gated_mlp(Interleaved()) == NOT_THE_PRODUCT
    assert gated_mlp(Joint(act=torch.sigmoid)) == NOT_THE_PRODUCT


def test_dropout_inside_is_noticed():
    class Dropped(MLP):
        def forward(self, x):
            return self.c(F.dropout(self.act(self.a(x)) * self.b(x), 0.3, self.training))

    assert gated_mlp(Dropped()) == GatedMLP("a", "b", "c", "silu", True)


def test_no_linear_layer_is_called():
    """A layer may store its weight anew in a call, as 4-bit ones do on some CPUs."""

    class Refusing(nn.Linear):
        def forward(self, x):
            raise AssertionError("called")

    class Four(MLP):
        def __init__(self):
            super().__init__()
            self.d = Refusing(K, 2 * K)

        def forward(self, x):
            self.d(x)
            return super().forward(x)

    class Unused(Four):
        forward = MLP.forward

    assert gated_mlp(Four()) == "its forward calls another linear layer"
    assert gated_mlp(Unused()) == GatedMLP("a", "b", "c", "silu", False)


def test_nothing_is_read_and_nothing_is_left_behind():
    module = MLP(nn.SiLU())
    with torch.device("meta"):
        unreadable = MLP(nn.SiLU())
    for m in (module, unreadable, convert(MLP(nn.SiLU()), r=2)):
        m.eval()
        m.act.train()
        before = {name: dict(child.__dict__) for name, child in m.named_modules()}
        children, generator = dict(m._modules), torch.get_rng_state()
        assert gated_mlp(m) == GatedMLP("a", "b", "c", "silu", False)
        assert {name: dict(child.__dict__) for name, child in m.named_modules()} == before
        assert m._modules == children and torch.equal(torch.get_rng_state(), generator)


def deceptive(name):
    """A module that is nearly a gated MLP, by the source of its forward."""
    body, reason = DECEPTIVE[name]
    space = {"torch": torch, "F": F}
    exec(f"def forward(self, x):\n{textwrap.indent(body, '    ')}", space)
    kind = type("Deceptive", (MLP,), {"forward": space["forward"], "calls": 0})
    return kind(), reason


H = "F.silu(self.a(x)) * self.b(x)"
Y = f"y = self.c({H})\nreturn y if"
DECEPTIVE = {
    "relu": ("return self.c(F.relu(self.a(x)) * self.b(x))", NOT_THE_PRODUCT),
    "sum": ("return self.c(F.silu(self.a(x)) + self.b(x))", NOT_THE_PRODUCT),
    "multiplier": (f"return self.c({H} * 1.01)", NOT_THE_PRODUCT),
    "multiplier of x": ("return self.c(F.silu(self.a(2 * x)) * self.b(x))", "call gate and up with its own input"),
    "multiplier of y": (f"return 0.5 * self.c({H})", "does not return what down returns"),
    "residual": (f"return x + self.c({H})", "does not return what down returns"),
    "norm": (f"h = {H}\nreturn self.c(h / (h.norm() + 1))", NOT_THE_PRODUCT),
    "clamp far out": ("return self.c(F.silu(self.a(x).clamp(max=5e4)) * self.b(x))", NOT_THE_PRODUCT),
    "detached": ("return self.c(F.silu(self.a(x)) * self.b(x).detach())", NOT_THE_PRODUCT),
    "another gradient": (f"h = {H}\nreturn self.c(h.detach() + 2 * (h - h.detach()))", NOT_THE_PRODUCT),
    "called twice": (f"self.a(x)\nreturn self.c({H})", "does not call each of its linear layers once"),
    "weights read": ("return self.c(F.silu(F.linear(x, self.a.weight)) * self.b(x))", "does not call each"),
    "long sequences": (f"{Y} x.shape[-2] < 100 else -y", "asks for its tensors' shape"),
    "long sequences by len": (f"{Y} len(x) < 100 else -y", "asks for its tensors' __len__"),
    "long sequences by size": (f"{Y} x.size(-2) < 100 else -y", "asks for its tensors' size"),
    "values": (f"{Y} x.sum() < 1e9 else -y", "asks for its tensors' __bool__"),
    "item": (f"{Y} x.sum().item() < 1e9 else -y", "asks for its tensors' item"),
    "counter": (f"self.calls += 1\nreturn self.c({H})", "changes its module"),
    "keeps h": (f"self.h = {H}\nreturn self.c(self.h)", "changes its module"),
    "bfloat16": (f"h = {H}\nreturn self.c(h if h.dtype == torch.float32 else 2 * h)", "something else in bfloat16"),
    "training": (f"h = {H}\nreturn self.c(2 * h if self.training else h)", None),
}


@pytest.mark.parametrize("name", DECEPTIVE)
def test_deceptive_modules(name):
    module, reason = deceptive(name)
    found = gated_mlp(module)
    if reason is None:
        assert found == GatedMLP("a", "b", "c", "silu", True)  # left alone in training mode
    else:
        assert isinstance(found, str) and reason in found


def test_what_is_no_mlp_at_all():
    assert gated_mlp(nn.Sequential(nn.Linear(K, I), nn.Linear(I, K))) is None
    assert gated_mlp(nn.Linear(K, I)) is None
    assert gated_mlp(nn.MultiheadAttention(K, 2)) is None
    with_mask = MLP()
    with_mask.forward = None
    assert isinstance(gated_mlp(copy.copy(with_mask)), GatedMLP)  # the class's forward is what is looked at


# --- readers of one input --------------------------------------------------------------------------------------------


QKV = "q = self.q(x)\nk = self.k(x)\nv = self.v(x)\n"
READERS = {
    "one after the other": (QKV, [("q", "k", "v")]),
    "something between": ("q = self.q(x)\nz = q.view(2)\nk = self.k(x)\nreturn z + k", [("q", "k")]),
    "one expression": ("return self.o(f(self.q(x)) * self.k(x).view(1))", [("q", "k")]),
    "bound again": ("q = self.q(x)\nx = x + 1\nk = self.k(x)\nv = self.v(x)\nreturn q + k + v", [("k", "v")]),
    "bound in a branch": ("q = self.q(x)\nif y:\n    x = y\nk = self.k(x)\nreturn q + k", []),
    "changed in place": (
        "q = self.q(x)\nx.add_(1)\nk = self.k(x)\nv = self.v(x)\nx[0] = 1\no = self.o(x)",
        [("k", "v")],
    ),
    "two inputs": ("q = self.q(x)\nk = self.k(y)\nv = self.v(y)\nreturn q + k + v", [("k", "v")]),
    "a branch of its own": ("q = self.q(x)\nif y:\n    k = self.k(x)\n    v = self.v(x)", [("k", "v")]),
    "may return between": ("q = self.q(x)\nif y:\n    return q\nk = self.k(x)\nv = self.v(x)\nreturn q + k + v", []),
    "only where asked": ("q = self.q(x)\nk = self.k(x) if y else 0\nv = y and self.v(x)\nreturn q + k + v", []),
    "in loops": ("for i in y:\n    a = self.a(x)\n    b = self.b(x)\nreturn a + b", [("a", "b")]),
    "more arguments": ("q = self.q(x, y)\nk = self.k(x)\nv = self.v(x=x)\nreturn q + k + v", []),
    "twice": ("a = self.a(x)\nb = self.b(x)\na = self.a(x)\nc = self.c(x)", [("a", "b"), ("a", "c")]),
    "in a handler": ("try:\n    a = self.a(x)\n    b = self.b(x)\nexcept ValueError:\n    a = 0", [("a", "b")]),
    "in another function": ("def f(self, x):\n    return self.a(x) + self.b(x)\nreturn f", []),
    "unpacked": ("q, (x, z) = self.q(x), y\nreturn q + self.k(x)", []),
}


@pytest.mark.parametrize("name", READERS)
def test_readers(name, tmp_path, monkeypatch):
    body, expected = READERS[name]
    lines = textwrap.indent(body, " " * 8)
    path = tmp_path / f"source_of_{name.replace(' ', '_')}.py"
    path.write_text(f"from torch import nn\n\nclass M(nn.Module):\n    def forward(self, x, y=None):\n{lines}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert sorted(shared_inputs(importlib.import_module(path.stem).M())) == sorted(expected)


def test_readers_without_a_source():
    assert shared_inputs(nn.Identity()) == []
    space = {}
    exec("def forward(self, x):\n    return self.a(x) + self.b(x)", space)
    assert shared_inputs(type("M", (nn.Module,), space)()) == []
