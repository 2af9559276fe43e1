"""Outputs that are written over before a layer's backward, so that PyTorch does not notice: gradients stay right."""

import sys
import types
import warnings

import pytest
import torch
from helpers.cases import Case
from torch.utils.checkpoint import checkpoint

from bora_kernels.blocks import Projection, gated_mlp, shared_input
from bora_kernels.contract import Adapter, Options
from bora_kernels.functional import bora_linear
from bora_kernels.ops import overwritten

pytestmark = pytest.mark.sampled(2)
KINDS = {"bora": ("bora", False), "dora": ("dora", True)}
each_kind = pytest.mark.parametrize("member, detach_norm", KINDS.values(), ids=list(KINDS))
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
M, N, K, HEADS = 6, 48, 40, 4


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    overwritten._protect.cache_clear()
    overwritten._warn.cache_clear()
    yield
    overwritten._protect.cache_clear()


@pytest.fixture
def rotation(monkeypatch):
    """Liger's, as far as memory goes: it writes over what it is given, and returns it."""
    library = types.ModuleType("liger_kernel.ops.rope")

    def rope_forward(q, k, cos, sin):
        for t in (q, k):
            t.data.mul_(cos)  # which leaves no trace in the version
        return q, k, cos, sin

    library.rope_forward = rope_forward
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, library.__name__, library)

    class Rotation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k):
            return library.rope_forward(q, k, 3.0, None)[:2]

        @staticmethod
        def backward(ctx, dq, dk):
            return 3.0 * dq, 3.0 * dk

    return Rotation.apply


class InPlaceGate(torch.autograd.Function):
    """As Liger's SwiGLU: gradients take the places of what they belong to."""

    @staticmethod
    def forward(ctx, a, b):
        shape = a.shape
        a, b = a.view(-1, shape[-1]), b.view(-1, shape[-1])
        ctx.save_for_backward(a, b)
        return (a * b).view(shape)

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        flat = dc.reshape(a.shape)
        da, db = flat * b, flat * a
        a.data.copy_(da)
        b.data.copy_(db)
        return a.view(dc.shape), b.view(dc.shape)


def projections(member, detach_norm, backend, device, requires=("lora_A", "lora_B", "magnitude_row", "magnitude_col")):
    made = []
    for seed in range(2):
        drawn = Case(M, N, K, 3, torch.float32, member, seed=seed).inputs(device)
        adapter = [drawn[name] for name in ("lora_A", "lora_B", "magnitude_row", "magnitude_col")]
        adapter = Adapter(
            *[
                None if t is None else t.detach().requires_grad_(name in requires)
                for name, t in zip(Adapter._fields, adapter, strict=True)
            ]
        )
        made.append(Projection(drawn["weight"], None, adapter, Options(0.5, "row_col", detach_norm, backend=backend)))
    return made


def one_by_one(x, layers):
    keywords = ("scaling", "norm_order", "detach_norm", "backend")
    return tuple(
        bora_linear(x, p.weight, *p.adapter, None, **{name: getattr(p.options, name) for name in keywords})
        for p in layers
    )


def gradients(layers, x, combine, run):
    x = x.clone().requires_grad_()
    inputs = [x, *[t for p in layers for t in p.adapter if t is not None and t.requires_grad]]
    loss = combine(*run(x, layers)).square().sum()
    return torch.autograd.grad(loss, inputs)


def heads(t):
    return t.unflatten(-1, (HEADS, -1)).transpose(0, 1)


@each_backend
@each_kind
@pytest.mark.parametrize("run", [one_by_one, shared_input], ids=["one by one", "shared input"])
def test_rotations_in_place_get_copies(member, detach_norm, backend, run, rotation, device):
    layers, x = projections(member, detach_norm, backend, device), torch.randn(M, K, device=device)
    expected = gradients(layers, x, lambda q, k: torch.cat((3 * heads(q), (3 * heads(k)) ** 2)), run)
    rotated = []

    def rotate(q, k):
        rotated.extend(rotation(heads(q), heads(k)))
        return torch.cat((rotated[0], rotated[1] ** 2))

    found = gradients(layers, x, rotate, run)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_no_layer_keeps_is_rotated_in_place(rotation, device):
    layers, x = projections("bora", False, "torch", device), torch.randn(M, K, device=device)
    one_by_one(x, layers)  # from here on the library is known
    q, k = torch.randn(2, M, N, device=device, requires_grad=True).unbind()
    with torch.no_grad():
        assert rotation(q, k)[0].data_ptr() == q.data_ptr()
        y = one_by_one(x, layers)[0]
        assert rotation(y, y.clone())[0].data_ptr() == y.data_ptr()


@each_backend
@each_kind
@pytest.mark.parametrize("run", [one_by_one, shared_input], ids=["one by one", "shared input"])
def test_gradients_in_the_place_of_outputs(member, detach_norm, backend, run, device):
    layers, x = projections(member, detach_norm, backend, device), torch.randn(2, M, K, device=device)
    expected = gradients(layers, x, torch.mul, run)
    with pytest.warns(UserWarning, match="was written over in the backward of what reads it"):
        found = gradients(layers, x, InPlaceGate.apply, run)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gradients(layers, x, InPlaceGate.apply, run)
    assert not [each for each in said if "written over" in str(each.message)]  # once is enough


def test_where_the_output_cannot_be_made_again(device):
    layers = projections("dora", True, "torch", device, requires=("lora_B", "magnitude_row"))
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="changed in place before its backward"):
        gradients(layers, torch.randn(M, K, device=device), InPlaceGate.apply, one_by_one)


def recomputed(function, *tensors):
    return checkpoint(function, *tensors, use_reentrant=False)


def handed_back(function, *tensors):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return function(*tensors)


@each_backend
@each_kind
@pytest.mark.parametrize("around", [recomputed, handed_back])
@pytest.mark.parametrize("run", [one_by_one, shared_input], ids=["one by one", "shared input"])
def test_changes_in_place_under_hooks(member, detach_norm, backend, run, around, device):
    """PyTorch looks at versions of what it keeps itself, and not of what hooks hand back."""
    layers, x = projections(member, detach_norm, backend, device), torch.randn(M, K, device=device)
    expected = gradients(layers, x, lambda q, k: q * (k + 1.5), run)

    def changed(x, layers):
        def block(x):
            q, k = run(x, layers)
            k += 1.5
            return q * k

        return (around(block, x),)

    found = gradients(layers, x, lambda y: y, changed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_mlp_whose_output_is_changed_in_place(device):
    layers = projections("bora", False, "torch", device) + [
        Projection(
            torch.randn(K, N, device=device),
            None,
            Adapter(*[torch.randn(s, device=device, requires_grad=True) for s in ((3, N), (K, 3), K, N)]),
            Options(0.5, backend="torch"),
        )
    ]
    x = 1e-3 * torch.randn(M, K, device=device)

    def mlp(x, layers):
        return gated_mlp(x, *layers, "silu")

    def changed(x):
        y = mlp(x, layers)
        y *= 3
        return y.tanh()  # keeps something: recomputation ends where nothing more is kept

    expected = gradients(layers, x, lambda y: y, lambda x, layers: ((3 * mlp(x, layers)).tanh(),))
    found = gradients(layers, x, lambda y: y, lambda x, layers: (recomputed(changed, x),))
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
