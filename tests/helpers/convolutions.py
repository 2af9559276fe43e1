"""Adapted convolutions written out, and convolutions whose channels the update cancels."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import CUDA
from helpers.accuracy import FLOOR, as_one, assert_accurate
from helpers.cases import MEMBERS, SCALING, require
from torch import Tensor, nn

from bora_kernels.functional import bora_conv
from bora_kernels.ops import convolution, weight_or_v

CONVS = {
    "1d": (lambda: nn.Conv1d(22, 30, 3, padding=1), (17,)),
    "1d-circular": (lambda: nn.Conv1d(25, 28, 5, stride=2, padding=3, padding_mode="circular"), (19,)),
    "2d": (lambda: nn.Conv2d(21, 26, (3, 2), stride=(2, 1), dilation=(1, 2), bias=False), (8, 9)),
    "2d-pointwise": (lambda: nn.Conv2d(44, 37, 1), (5, 6)),
    "3d": (lambda: nn.Conv3d(20, 23, (1, 2, 2), padding=1), (3, 4, 5)),
}
WAYS = ("read", "unread", "kernel")


def act_by_word(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the word of cancelled channels acts: a CPU reads it, or it makes the weight, by operations or the kernel."""
    if way == "read":
        if CUDA:
            pytest.skip("a GPU's word is not read")
        return
    monkeypatch.setattr(convolution, "_can_read", lambda word: False)
    if way == "kernel" and CUDA:
        return  # as it is: the operator
    made = weight_or_v.by_kernel if way == "kernel" else weight_or_v.by_operations
    monkeypatch.setattr(convolution, "weight_or_v", made)


def require_kernel(word, dtype):
    """Skip what the kernel cannot run."""
    if word == "kernel":
        if dtype == torch.float64:
            pytest.skip("the kernel computes in float32")
        require("triton", dtype)


def layer_of(conv, **options):
    def layer(x, *factors):
        convolve = lambda t, kernel: conv._conv_forward(t, kernel, None)  # noqa: E731
        return bora_conv(x, conv.weight, *factors, conv.bias, convolve, scaling=SCALING, **options)

    return layer


def dense_of(conv, **options):
    def layer(x, *factors):
        W = dense_conv_weight(conv.weight.to(factors[0].dtype), *factors, **options)
        return conv._conv_forward(x, W.to(x.dtype), conv.bias)

    return layer


def make(name, dtype, device):
    new, space = CONVS[name]
    conv = new().to(device, dtype).requires_grad_(False)
    x = torch.randn(4, conv.in_channels, *space, device=device).to(dtype)
    return conv, x, torch.randn_like(conv(x))


def dense_conv_weight(weight, A, B, row, col, *, norm_order="row_col", detach_norm=False):
    """W' of a convolution written out: a row is an output channel, a column an input channel with its taps."""
    W = weight + SCALING * torch.einsum("nr,rk...->nk...", B, A)
    for axis in norm_order.split("_"):
        magnitude, kept = (row, 0) if axis == "row" else (col, 1)
        if magnitude is not None:
            shape = [-1 if d == kept else 1 for d in range(W.ndim)]
            norm = W.square().sum([d for d in range(W.ndim) if d != kept], keepdim=True).sqrt()
            W = W / (norm.detach() if detach_norm else norm) * magnitude.view(shape)
    return W


def run(layer, *leaves, dy=None):
    """The output and the gradients with respect to those of the leaves that there are."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    y = layer(*leaves)
    there = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(y, there, dy.to(y.dtype))
    return {"y": y.detach()} | {f"d_{i}": gradient for i, gradient in enumerate(gradients)}


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def cancelled_factors(
    conv: nn.Module, lines: tuple[str, ...], left: float, *, rank: int, member: str = "bora"
) -> list[Tensor | None]:
    """A, B and magnitudes whose update leaves ``left`` of an output channel ("row"), an input channel ("col") or both.

    What is left has another direction than W0's, so that no gradient is 0 for it. A column takes a rank for each tap.
    """
    W = conv.weight.detach().double().cpu()
    N, K, *kernel = W.shape
    taps, flat = W[0, 0].numel(), W.flatten(2)
    A, B = torch.randn(rank, K, taps).double() / (K * taps) ** 0.5, torch.randn(N, rank).double() / rank**0.5
    row, col = N // 2, K // 3
    if "row" in lines:
        A[0] = flat[row] + left * flat[row].norm() * _direction(K, taps)
        B[:, 0] *= 0.1
        B[row] = 0.0
        B[row, 0] = -1 / SCALING
    if "col" in lines:
        own = slice(rank - taps, rank)
        A[own] = 0.0
        A[:, col] = 0.0
        A[own, col] = -torch.eye(taps, dtype=torch.float64) / SCALING
        B[:, own] = flat[:, col] + left * flat[:, col].norm() * _direction(N, taps)
    A = A.view(rank, K, *kernel)
    V = W + SCALING * torch.einsum("nr,rk...->nk...", B, A)
    for name, one, other in (("row", V[row], W[row]), ("col", V[:, col], W[:, col])):
        assert (one.norm() < 1.5 * left * other.norm()) == (name in lines), name
    norms = {"magnitude_row": W.flatten(1).norm(dim=1), "magnitude_col": W.transpose(0, 1).flatten(1).norm(dim=1)}
    magnitudes = {name: norm * (1 + 0.1 * torch.randn_like(norm)) for name, norm in norms.items()}
    for magnitude in magnitudes.values():
        magnitude[1] *= -1
    magnitudes |= dict.fromkeys(MEMBERS[member])
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    return [None if t is None else t.to(conv.weight.device, wide) for t in (A, B, *magnitudes.values())]


def _direction(*shape: int) -> Tensor:
    noise = torch.randn(shape, dtype=torch.float64)
    return noise / noise.norm()


def beside_dense(conv, x, factors, dy, *, layer=layer_of, **options):
    """Output and gradients, named as ``run`` names them: of the layer, and of W' written out plainly and exactly.

    And those with detached norms, the terms of what is exact.
    """
    actual = run(layer(conv, **options), x, *factors, dy=dy)
    plain = run(dense_of(conv, **options), x, *factors, dy=dy)
    wide = copy.deepcopy(conv).double()
    exact, terms = (
        run(dense_of(wide, **(options | more)), *double(x, *factors), dy=dy) for more in ({}, {"detach_norm": True})
    )
    return actual, plain, exact, terms


def check(conv, x, factors, dy, **options):
    """Hold output and gradients to the accuracy rule; returns them."""
    actual, plain, exact, terms = beside_dense(conv, x, factors, dy, **options)
    assert_accurate(actual, plain, exact, samples=min(conv.weight.shape[:2]), terms=terms)
    return actual


def check_together(layers, lines, *, leave_out=(), floor=FLOOR, **options):
    """Hold each result of several layers (conv, x, factors, dy) to the rule as one tensor.

    Where two of the layers' lines are cancelled, most of it are the numbers that they have in common: one for each tap.
    """
    weight = layers[0][0].weight
    samples = len(layers) * weight[0, 0].numel() if len(lines) == 2 else min(weight.shape[:2])
    results = as_one(beside_dense(*layer, **options) for layer in layers)
    actual, plain, exact, terms = ({name: t for name, t in some.items() if name not in leave_out} for some in results)
    assert_accurate(actual, plain, exact, samples=samples, terms=terms, floor=floor)
