"""The gate of an MLP on kernels: h = act(e)⊙f and its backward, and the MLPs that run on them."""

import pytest
import torch
import torch.nn.functional as F
from helpers.accuracy import assert_accurate
from helpers.cases import dtypes, require

pytest.importorskip("triton")

from bora_kernels.blocks import Projection, gate_kernels, gated_mlp
from bora_kernels.contract import Adapter, Options
from bora_kernels.kernels import gated

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def plain(e, f, dh, activation):
    e, f = e.clone().requires_grad_(), f.clone().requires_grad_()
    h = ACTIVATIONS[activation](e) * f
    de, df = torch.autograd.grad(h, (e, f), dh)
    return {"h": h.detach(), "de": de, "df": df}


def kernels(e, f, dh, activation):
    de, df = gate_kernels.gate_backward(dh.clone(), e, f, activation)
    return {"h": gate_kernels.gate(e, f, activation), "de": de, "df": df}


@each_activation
@dtypes
def test_gate_and_its_backward(activation, dtype, device):
    require("triton", dtype)
    e, f, dh = ((scale * torch.randn(31, 83)).to(device, dtype) for scale in (3, 1, 1))
    e[0, :4] = torch.tensor([0.0, -0.0, 40.0, -40.0])
    wide = (t.double() for t in (e, f, dh))
    expected = plain(e, f, dh, activation), plain(*wide, activation)
    assert_accurate(kernels(e, f, dh, activation), *expected, samples=e.numel())


@each_activation
def test_gate_reads_strided_tensors_and_gives_the_same_bits_again(activation, device):
    e, f, dh = (torch.randn(17, 29, device=device).T for _ in range(3))
    first, second = kernels(e, f, dh, activation), kernels(*(t.contiguous() for t in (e, f, dh)), activation)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_de_is_written_over_dh(device):
    """A block holds one of them at a time; e and f are kept for other uses of the graph."""
    e, f, dh = (torch.randn(9, 40, device=device) for _ in range(3))
    before = e.clone(), f.clone()
    expected = plain(e, f, dh, "silu")["de"]
    de, df = gate_kernels.gate_backward(dh, e, f, "silu")
    assert de is dh and df.data_ptr() not in (e.data_ptr(), f.data_ptr(), dh.data_ptr())
    torch.testing.assert_close(de, expected)
    assert torch.equal(e, before[0]) and torch.equal(f, before[1])


@pytest.mark.parametrize("backend, used", [("triton", True), ("torch", False)])
def test_an_mlp_with_biases_runs_the_gate_where_its_layers_run(backend, used, device, monkeypatch):
    called = set()  # not how often: a GPU's first calls run stages twice
    for name in ("gate", "gate_backward"):
        own = getattr(gated, name)
        monkeypatch.setattr(gated, name, lambda *args, own=own, name=name: (called.add(name), own(*args))[1])

    def layer(n, k):
        adapter = Adapter(torch.randn(2, k, device=device, requires_grad=True), torch.randn(n, 2, device=device))
        weight, bias = torch.randn(n, k, device=device), torch.randn(n, device=device)
        return Projection(weight, bias, adapter, Options(0.5, backend=backend))

    gated_mlp(torch.randn(5, 20, device=device), layer(24, 20), layer(24, 20), layer(18, 24), "silu").sum().backward()
    assert called == ({"gate", "gate_backward"} if used else set())
