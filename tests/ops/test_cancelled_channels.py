"""Channels of a convolution that the update cancels: outputs and gradients are right to a fraction of what is left."""

import copy

import pytest
import torch
from conftest import INTERPRETING
from helpers.accuracy import assert_accurate, assert_equal
from helpers.cases import HALVES, NAMES, SCALING, conventions, dtypes, orders, require
from helpers.convolutions import (
    CONVS,
    WAYS,
    act_by_word,
    cancelled_factors,
    check,
    check_together,
    dense_conv_weight,
    dense_of,
    double,
    layer_of,
    make,
    require_kernel,
    run,
)
from helpers.graphs import capture
from torch import nn

from bora_kernels.ops import convolution, weight_or_v

pytestmark = [pytest.mark.usefixtures("float32_convolutions"), pytest.mark.sampled(8)]
lines = pytest.mark.parametrize("lines", [("row",), ("col",), ("row", "col")], ids="-".join)


@pytest.fixture(params=WAYS)
def word(request, monkeypatch):
    act_by_word(request.param, monkeypatch)
    return request.param


def layers_of(name, dtype, device, lines, lefts, **options):
    """A layer for each of what is left of its lines; three where the numbers that two lines have in common are few."""
    lefts *= 3 if len(lines) == 2 and dtype in HALVES else 1
    made = [make(name, dtype, device) for _ in lefts]
    factors = [cancelled_factors(conv, lines, left, **options) for (conv, *_), left in zip(made, lefts, strict=True)]
    return [(conv, x, own, dy) for (conv, x, dy), own in zip(made, factors, strict=True)]


@pytest.mark.parametrize("conv", CONVS)
@lines
@dtypes
@orders
def test_cancelled_channels(word, conv, dtype, order, lines, device):
    """The gradients of factors are left out where all but one number of them is small: both lines' only common one."""
    require_kernel(word, dtype)
    if word == "kernel" and INTERPRETING and conv not in ("1d", "2d"):
        pytest.skip("which weight is made is seen by two of them, and by test_weight_or_v_of_the_kernel")
    meet = conv == "2d-pointwise" and len(lines) == 2 and dtype in HALVES
    layers = layers_of(conv, dtype, device, lines, (1e-2, 3e-3, 1e-3), rank=11)
    check_together(layers, lines, norm_order=order, leave_out=("d_1", "d_2") if meet else ())


@pytest.mark.parametrize("member", ["dora", "columns", "lora"])
@dtypes
@conventions
def test_other_members_and_detached_norms(word, dtype, member, detach_norm, device):
    require_kernel(word, dtype)
    for name, lines in (("1d", ("row",)), ("2d", ("col",)), ("3d", ("row", "col"))):
        layers = layers_of(name, dtype, device, lines, (4e-3, 1e-2, 2e-3), rank=8, member=member)
        check_together(layers, lines, detach_norm=detach_norm)


def test_float64(word, device):
    require_kernel(word, torch.float64)
    conv, x, dy = make("2d", torch.float64, device)
    check(conv, x, cancelled_factors(conv, ("row", "col"), 1e-3, rank=9), dy)


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@lines
def test_under_autocast(word, dtype, lines, device):
    """A float32 weight is rounded as V, not by itself."""
    require_kernel(word, dtype)
    conv, x, _ = make("1d", torch.float32, device)
    x, factors = x.to(dtype), cancelled_factors(conv, lines, 5e-3, rank=9)

    def layer(conv, **options):
        def call(*leaves):
            with torch.autocast(torch.device(device).type, dtype):
                return layer_of(conv, **options)(*leaves)

        return call

    def dense(x, *factors):
        W = dense_conv_weight(conv.weight, *factors).to(dtype)
        return conv._conv_forward(x, W, conv.bias.to(dtype))

    dy = torch.randn_like(dense(x, *factors))
    actual, plain = run(layer(conv), x, *factors, dy=dy), run(dense, x, *factors, dy=dy)
    exact, terms = (
        run(dense_of(copy.deepcopy(conv).double(), detach_norm=detach), *double(x, *factors), dy=dy)
        for detach in (False, True)
    )
    assert_accurate(actual, plain, exact, samples=22, terms=terms)


def test_without_a_batch_axis(word, device):
    require_kernel(word, torch.bfloat16)
    conv, x, dy = make("2d", torch.bfloat16, device)
    check(conv, x[0], cancelled_factors(conv, ("row",), 1e-3, rank=7), dy[0])


# ---- ordinary layers ----


@dtypes
@orders
def test_ordinary_layers_are_what_they_are_without_a_word(word, dtype, order, device, monkeypatch):
    """To the bit, update and all gradients: the weight is W0's copy, and nothing is taken away."""
    require_kernel(word, dtype)
    conv, x, dy = make("2d", dtype, device)
    factors = cancelled_factors(conv, (), 1e-3, rank=5)
    with_word = run(layer_of(conv, norm_order=order), x, *factors, dy=dy)
    plain = convolution.axis_scales
    monkeypatch.setattr(convolution, "axis_scales", lambda *arguments, judge: (*plain(*arguments)[:2], None))
    assert_equal(with_word, run(layer_of(conv, norm_order=order), x, *factors, dy=dy))


def test_with_dropout_nothing_cancels(device):
    """The low-rank product lacks what was dropped, of W0's nothing is: on the average the layer is that without."""
    conv, x, _ = make("1d", torch.float64, device)
    factors = cancelled_factors(conv, ("row",), 0.05, rank=4)
    draws = torch.stack([layer_of(conv, dropout_p=0.5, training=True)(x, *factors) for _ in range(400)])
    error = (draws.mean(0) - layer_of(conv)(x, *factors)).abs() / (draws.std(0) / 20)
    assert draws.std(0)[:, 15].min() > 0.1 and error.max() < 5.5  # of 2040 normal deviations


# ---- the weight ----


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "weight_dtype, dtype",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_weight_or_v_of_the_kernel(weight_dtype, dtype, channels_last, device):
    """Either to the bit, or rounded once from V, on average to V; in the weight's own memory format."""
    require("triton", dtype)
    weight = torch.randn(33, 21, 3, 4, device=device).to(weight_dtype)
    A, B = torch.randn(19, 21, 3, 4, device=device), torch.randn(33, 19, device=device) / 4
    if channels_last:
        weight, A = (t.to(memory_format=torch.channels_last) for t in (weight, A))
    p, q = (2.0 ** torch.randint(-5, 6, (size,), device=device) for size in weight.shape[:2])
    V = weight.double() + SCALING * torch.einsum("nr,rk...->nk...", B.double(), A.double())
    bound = 4e-6 if dtype == torch.float32 else 1.01 * torch.finfo(dtype).eps
    for place, powers in enumerate([(None, None), (p, q)]):
        word = torch.zeros(4, device=device)
        tensors = weight_or_v.Tensors(weight, A, B, word, *powers)
        made = weight_or_v.by_kernel(tensors, SCALING, dtype)
        assert made.stride() == weight.stride() and torch.equal(made, weight.to(dtype))
        word[place] = 1.0
        made = weight_or_v.by_kernel(tensors, SCALING, dtype)
        assert made.stride() == weight.stride() and made.dtype == dtype
        scaled = made.double() if place == 0 else made.double() / (p[:, None] * q)[..., None, None]
        error = (scaled - V) / torch.maximum(V.abs(), V.new_full((), 0.1))
        assert error.abs().max() < bound and error.mean().abs() < bound / 30
        assert torch.equal(made, weight_or_v.by_kernel(tensors, SCALING, dtype))


@pytest.mark.gpu
@dtypes
def test_a_graph_of_a_layer_whose_channels_cancel_later(dtype, device):
    """What a CUDA graph was captured with says nothing of the channels that it meets."""
    conv, x, dy = make("2d", dtype, device)
    leaves = [t.clone().requires_grad_() for t in (x, *cancelled_factors(conv, (), 1e-3, rank=9))]

    def step():
        y = layer_of(conv)(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    graph, results = capture(step)
    with torch.no_grad():
        for leaf, t in zip(leaves[1:], cancelled_factors(conv, ("row",), 1e-3, rank=9), strict=True):
            leaf.copy_(t)
    graph.replay()
    torch.cuda.synchronize()
    plain = run(dense_of(conv), *leaves, dy=dy)
    wide = copy.deepcopy(conv).double()
    exact, terms = (run(dense_of(wide, detach_norm=detach), *double(*leaves), dy=dy) for detach in (False, True))
    assert_accurate(dict(zip(plain, results, strict=True)), plain, exact, samples=21, terms=terms)


def test_a_pointwise_weight_keeps_its_strides(device):
    """Other strides of the same memory are those of channels last, and PyTorch would convolve so."""
    require("triton", torch.float32)
    weight = torch.randn(40, 24, 1, 1, device=device)
    A, B, word = (
        torch.randn(2, 24, 1, 1, device=device),
        torch.randn(40, 2, device=device),
        torch.ones(4, device=device),
    )
    tensors = weight_or_v.Tensors(weight, A, B, word, None, None)
    made = weight_or_v.by_kernel(tensors, SCALING, torch.float32)
    assert made.stride() == weight.stride()
    torch.testing.assert_close(made, weight_or_v.by_operations(tensors, SCALING, torch.float32))


@pytest.mark.parametrize("scale", [1.0, 0.02])
@lines
def test_range_of_float16(word, lines, scale, device):
    """Of a weight with elements of a layer of many channels; what is left of them is 1e-5 and less.

    The gradients of factors are left out where two lines meet in few numbers.
    """
    require_kernel(word, torch.float16)
    layers = []
    for _ in range(3):
        conv, x, dy = make("1d", torch.float16, device)
        with torch.no_grad():
            conv.weight *= scale
        layers.append((conv, x, cancelled_factors(conv, lines, 1e-3, rank=8), dy))
    check_together(layers, lines, leave_out=("d_1", "d_2") if len(lines) == 2 else ())


@pytest.mark.gpu
@dtypes
@lines
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_large_layers(dtype, lines, channels_last, device, monkeypatch):
    """In float32 without cuDNN: of its algorithms some err by 1e-6 to 2.6e-6 here, PyTorch's own by 2 to 5e-7."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", dtype != torch.float32)
    conv = nn.Conv2d(320, 256, 3, padding=1).to(device, dtype).requires_grad_(False)
    x = torch.randn(2, 320, 24, 24, device=device).to(dtype)
    if channels_last:
        conv, x = (t.to(memory_format=torch.channels_last) for t in (conv, x))
    factors = cancelled_factors(conv, lines, 1e-3, rank=16)
    meet = len(lines) == 2 and dtype in HALVES
    layer = conv, x, factors, torch.randn_like(conv(x))
    check_together([layer], lines, leave_out=("d_1", "d_2") if meet else ())


@pytest.mark.gpu
@dtypes
@lines
def test_with_tf32(dtype, lines, device, monkeypatch):
    """PyTorch's default for convolutions in float32, so for the low-rank ones of every layer: both operands truncated.

    Errors are held to what results are made of, since plain PyTorch makes some of its products in float32 all the same.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    conv = nn.Conv2d(192, 160, 3, padding=1).to(device, dtype).requires_grad_(False)
    x = torch.randn(2, 192, 24, 24, device=device).to(dtype)
    factors = cancelled_factors(conv, lines, 1e-2, rank=16)
    meet = len(lines) == 2 and dtype in HALVES
    layer = conv, x, factors, torch.randn_like(conv(x))
    check_together([layer], lines, floor=2**-9, leave_out=("d_1", "d_2") if meet else ())
