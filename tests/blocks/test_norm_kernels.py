"""RMSNorm on kernels: y and dx against the formula, and the norms that run on them."""

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.cases import dtypes, require

pytest.importorskip("triton")

from bora_kernels.blocks import NormOrigin, norm_kernels, norms, reference, rms_norm

EPS = 1e-5
offsets = pytest.mark.parametrize("offset", [0.0, 1.0], ids=["plain", "gemma"])


def formula(x, weight, dy, offset, dtype):
    x = x.to(dtype).detach().requires_grad_()
    y = reference.rms_norm_ref(x, weight.to(dtype), EPS, offset)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy.to(dtype))[0]}


def kernels(x, weight, dy, offset):
    y, dx = norm_kernels.rms_norm(x, weight, offset, EPS), norm_kernels.rms_norm_backward(dy, x, weight, offset, EPS)
    return {"y": y, "dx": dx}


def inputs(shape, dtype, device):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return x, (0.5 + torch.rand(shape[-1], device=device)).to(dtype), dy


@pytest.fixture
def on_kernels(monkeypatch, device):
    """Norms run on kernels here too; the names of those that were called."""
    monkeypatch.setattr(norms, "_on_triton", lambda device, dtype: dtype != torch.float64)
    called = []
    for name in ("rms_norm", "rms_norm_backward"):
        own = getattr(norm_kernels, name)
        monkeypatch.setattr(norm_kernels, name, lambda *args, own=own, name=name: (called.append(name), own(*args))[1])
    return called


@offsets
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 129), (70, 33), (5, 1), (3, 2500)], ids=str)
@dtypes
def test_norm_and_its_backward(dtype, shape, offset, device):
    require("triton", dtype)
    x, weight, dy = inputs(shape, dtype, device)
    expected = (formula(x, weight, dy, offset, wide) for wide in (dtype, torch.float64))
    actual = kernels(x, weight, dy, offset)
    assert all(t.dtype == dtype and t.shape == shape for t in actual.values())
    assert_accurate(actual, *expected, samples=x.numel())


@offsets
def test_rows_of_zeros_large_and_tiny_ones(offset, device):
    x, weight, dy = inputs((6, 50), torch.float32, device)
    x *= torch.tensor([0.0, 1e-6, 1e-3, 1.0, 1e6, 1e15], device=device)[:, None]
    expected = [formula(x, weight, dy, offset, wide) for wide in (torch.float32, torch.float64)]
    actual = kernels(x, weight, dy, offset)
    for row in range(6):  # each by itself, so that the large ones hide nothing
        assert_accurate(*[{name: t[row] for name, t in each.items()} for each in (actual, *expected)], samples=50)


def test_weight_of_another_dtype_and_strided_inputs_give_the_same_bits(device):
    x, weight, dy = inputs((9, 64), torch.bfloat16, device)
    first = kernels(x, weight, dy, 1.0)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (x, weight, dy)]
    assert not any(t.is_contiguous() for t in strided)
    for second in (kernels(*strided, 1.0), kernels(x, weight.float(), dy, 1.0)):
        assert all(torch.equal(value, second[name]) for name, value in first.items())


@offsets
def test_norms_run_on_the_kernels_and_make_their_output_anew_to_the_bit(offset, on_kernels, device):
    x, weight, dy = inputs((2, 4, 48), torch.float32, device)
    x.requires_grad_()
    y = rms_norm(x, weight, EPS, offset)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert on_kernels == ["rms_norm", "rms_norm_backward"]
    expected = (formula(x, weight, dy, offset, wide) for wide in (torch.float32, torch.float64))
    assert_accurate({"y": y.detach(), "dx": dx}, *expected, samples=x.numel())
    assert torch.equal(NormOrigin(x.detach(), weight, offset, EPS).output(), y)


@pytest.mark.parametrize(
    "shape, dtype", [((0, 8), torch.float32), ((2, 16385), torch.float32), ((2, 8), torch.float64)]
)
def test_what_kernels_do_not_take_is_done_by_pytorch(shape, dtype, on_kernels, device):
    x, weight, dy = inputs(shape, dtype, device)
    x.requires_grad_()
    y = rms_norm(x, weight, EPS, 1.0)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert not on_kernels and y.shape == dx.shape == shape
    if x.numel():
        expected = (formula(x, weight, dy, 1.0, wide) for wide in (dtype, torch.float64))
        assert_accurate({"y": y.detach(), "dx": dx}, *expected, samples=x.numel())


def test_second_derivatives_are_those_of_the_formula(on_kernels, device):
    x, weight, dy = inputs((3, 20), torch.float32, device)
    found = []
    for norm in (lambda x: rms_norm(x, weight, EPS, 1.0), lambda x: reference.rms_norm_ref(x, weight, EPS, 1.0)):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad((norm(leaf) * dy).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaf)[0])
    assert on_kernels == ["rms_norm"]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
