"""Embeddings and convolutions: outputs and all gradients against dense formulas, and what autograd keeps for them."""

import pytest
import torch
import torch.nn.functional as F
from helpers.accuracy import as_one, assert_accurate, assert_equal
from helpers.cases import HALVES, MEMBERS, NAMES, SCALING, conventions, orders
from helpers.convolutions import dense_conv_weight, double, run
from torch import nn

from bora_kernels.contract import Adapter, Options
from bora_kernels.functional import bora_conv, bora_embedding, bora_linear
from bora_kernels.ops import adapted_weight
from bora_kernels.reference import bora_weight_ref

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=NAMES.get)
members = pytest.mark.parametrize("member", ["bora", "dora", "columns"])
convs = pytest.mark.parametrize(
    "conv",
    [
        pytest.param(lambda: nn.Conv1d(6, 10, 3, padding=1), id="1d"),
        pytest.param(lambda: nn.Conv1d(6, 10, 3, padding=2, padding_mode="circular"), id="1d-circular"),
        pytest.param(lambda: nn.Conv2d(6, 10, (3, 2), stride=2, dilation=(1, 2), bias=False), id="2d-stride-dilation"),
        pytest.param(lambda: nn.Conv2d(6, 10, 1), id="2d-pointwise"),
        pytest.param(lambda: nn.Conv3d(6, 10, (1, 2, 3), padding="same"), id="3d-same"),
    ],
)


def norms(weight, A, B):
    """What magnitudes start as, for a weight [N, K, ...]."""
    taps = weight.shape[2:].numel()
    return adapted_weight.norms(weight.flatten(1), Adapter(A.flatten(1), B), scaling=SCALING, taps=taps)


def merged_weight(weight, A, B, row, col, order):
    """W' in the layout of the weight [N, K, ...]."""
    adapter, taps = Adapter(A.flatten(1), B, row, col), weight.shape[2:].numel()
    options = Options(SCALING, order)
    return adapted_weight.effective_weight(weight.flatten(1), adapter, options, taps=taps).view(weight.shape)


def trained_factors(weight, rank=3, member="bora"):
    """Factors and magnitudes after some training, float32 over half precision."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    N, K, *kernel = weight.shape
    A, B = torch.randn(rank, K, *kernel, dtype=dtype) / K**0.5, torch.randn(N, rank, dtype=dtype) / rank**0.5
    row, col = (norm * (1 + 0.1 * torch.randn_like(norm)) for norm in norms(weight, A, B))
    absent = MEMBERS[member]
    return A, B, None if "magnitude_row" in absent else row, None if "magnitude_col" in absent else col


# ---- embedding ----


@dtypes
@members
@orders
@conventions
def test_embedding(dtype, member, order, detach_norm):
    K, N = 23, 40
    weight = torch.randn(K, N).to(dtype)
    factors = trained_factors(weight.T, member=member)
    ids = torch.randint(0, K, (4, 9))
    dy = torch.randn(4, 9, N).to(dtype)
    options = {"norm_order": order, "detach_norm": detach_norm, "scaling": SCALING}

    def dense(weight, dtype):
        return lambda *factors: bora_weight_ref(weight.T, *factors, **options).T[ids].to(dtype)

    actual = run(lambda *factors: bora_embedding(ids, weight, *factors, **options), *factors, dy=dy)
    plain = run(dense(weight, dtype), *factors, dy=dy)
    exact = run(dense(weight.double(), torch.float64), *double(*factors), dy=dy)
    assert_accurate(actual, plain, exact, samples=K)


def test_embedding_keeps_a_zero_padding_row_and_no_gradient_for_it():
    base = nn.Embedding(11, 8, padding_idx=2)
    A, B, row, col = (t.requires_grad_() for t in trained_factors(base.weight.detach().T))
    with torch.no_grad():
        A[:, 2] = 0.0
    ids = torch.tensor([[2, 3, 2]])
    y = bora_embedding(ids, base.weight.detach(), A, B, row, col, scaling=SCALING, padding_idx=2)
    assert torch.equal(y[0, 0], torch.zeros(8)) and y[0, 1].abs().min() > 0
    y.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (A, B, row, col))
    assert torch.equal(A.grad[:, 2], torch.zeros(3))


# ---- convolution ----


@convs
@dtypes
@orders
@conventions
@members
def test_convolution(conv, dtype, order, detach_norm, member):
    results = [beside_dense_convolution(conv, dtype, order, detach_norm, member) for _ in range(4)]
    actual, plain, exact, _ = as_one((*each, each[-1]) for each in results)  # of six channels alone, chance decides
    assert_accurate(actual, plain, exact, samples=30 * len(results))


def beside_dense_convolution(conv, dtype, order, detach_norm, member):
    """What a random layer makes, and the dense reference in the same dtypes and in float64."""
    base = conv().to(dtype).requires_grad_(False)
    factors = trained_factors(base.weight, member=member)
    x = torch.randn(3, 6, *([7] * (base.weight.ndim - 2))).to(dtype)
    dy = torch.randn_like(base(x))
    options = {"norm_order": order, "detach_norm": detach_norm}

    def layer(x, *factors):
        convolve = lambda t, kernel: base._conv_forward(t, kernel, None)  # noqa: E731
        return bora_conv(x, base.weight, *factors, base.bias, convolve, scaling=SCALING, **options)

    def dense(base):
        def run_dense(x, *factors):
            W = dense_conv_weight(base.weight.to(factors[0].dtype), *factors, **options)
            return base._conv_forward(x, W.to(x.dtype), base.bias)

        return run_dense

    actual = run(layer, x, *factors, dy=dy)
    plain = run(dense(base), x, *factors, dy=dy)
    return actual, plain, run(dense(base.double()), *double(x, *factors), dy=dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("cancelled", [False, True])
def test_convolution_whose_weight_is_stored_otherwise_after_the_call(cancelled, dtype):
    """As layerwise casting does it, which PyTorch's own convolution does not survive in bfloat16."""
    base = nn.Conv1d(6, 10, 3).to(dtype).requires_grad_(False)
    base.weight.data = base.weight.data.to(torch.float8_e4m3fn).to(dtype)
    factors = trained_factors(base.weight)
    if cancelled:
        factors[0][0] = -base.weight[0].float() / SCALING
        factors[1][0] = F.one_hot(torch.tensor(0), factors[1].shape[1])
    x, dy = torch.randn(3, 6, 9, dtype=dtype), torch.randn(3, 10, 7, dtype=dtype)

    def layer(stored):
        def call(x, *factors):
            weight = nn.Parameter(base.weight.clone(), requires_grad=False)
            y = bora_conv(x, weight, *factors, base.bias, lambda t, W: base._conv_forward(t, W, None), scaling=SCALING)
            weight.data = weight.data.to(stored)
            return y

        return run(call, x, *factors, dy=dy)

    assert_equal(layer(torch.float8_e4m3fn), layer(dtype))


@pytest.mark.parametrize("space", [(10,), (6, 10), (10, 10), (3, 6, 10)], ids=str)  # sizes of the channels among them
@members
def test_convolution_without_a_batch_axis(space, member):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(space)](6, 10, 3, padding=1).double().requires_grad_(False)
    factors = trained_factors(conv.weight, member=member)

    def layer(x, *factors):
        convolve = lambda t, kernel: conv._conv_forward(t, kernel, None)  # noqa: E731
        return bora_conv(x, conv.weight, *factors, conv.bias, convolve, scaling=SCALING)

    x, dy = torch.randn(6, *space).double(), torch.randn(10, *space).double()
    alone, batched = run(layer, x, *factors, dy=dy), run(layer, x[None], *factors, dy=dy[None])
    assert all(torch.allclose(value, batched[name].view_as(value), rtol=1e-12) for name, value in alone.items())
    torch.testing.assert_close(alone["y"], conv._conv_forward(x, dense_conv_weight(conv.weight, *factors), conv.bias))


@orders
def test_pointwise_convolution_is_the_linear_layer(order):
    weight = torch.randn(10, 6, dtype=torch.float64)
    factors = trained_factors(weight)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    A, *rest = factors
    y = bora_conv(x, weight[..., None], A[..., None], *rest, None, F.conv1d, scaling=SCALING, norm_order=order)
    expected = bora_weight_ref(weight, *factors, scaling=SCALING, norm_order=order) @ x
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_convolution_dropout_acts_on_the_low_rank_branch_only():
    """Averaged over masks it is the layer without dropout; where the low-rank product is zero it is that exactly."""
    weight, x = torch.randn(8, 4, 3, dtype=torch.float64), torch.randn(1, 4, 9, dtype=torch.float64)
    A, B, row, col = trained_factors(weight)

    def layer(B, **dropout):
        return bora_conv(x, weight, A, B, row, col, None, F.conv1d, scaling=SCALING, **dropout)

    assert torch.equal(layer(0 * B, dropout_p=0.5, training=True), layer(0 * B))
    assert torch.equal(layer(B, dropout_p=0.5, training=False), layer(B))
    draws = torch.stack([layer(B, dropout_p=0.5, training=True) for _ in range(400)])
    error = (draws.mean(0) - layer(B)).abs() / (draws.std(0) / 20)
    assert draws.std(0).min() > 0 and error.max() < 4.5  # of 56 normal deviations


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_small_changes_of_a_column_magnitude_reach_a_half_precision_convolution(dtype):
    """A change of 1e-3, which x⊙g rounded to half precision would lose, arrives within a tenth of its size."""
    base = nn.Conv1d(64, 32, 3).to(dtype).requires_grad_(False)
    A, B = torch.zeros(2, 64, 3), torch.zeros(32, 2)
    row, col = norms(base.weight, A, B)
    x = torch.randn(8, 64, 50).to(dtype)
    change = 1e-3 * torch.randn(64)

    def layer(col, weight, x, bias):
        return bora_conv(x, weight, A.to(x.dtype), B.to(x.dtype), row.to(weight), col, bias, F.conv1d, scaling=SCALING)

    def effect(dtype):
        weight, inputs, bias = base.weight.to(dtype), x.to(dtype), base.bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        moved, still = (layer(c.to(wide), weight, inputs, bias).double() for c in (col * (1 + change), col))
        return moved - still

    exact = effect(torch.float64)
    measured = effect(dtype)
    slope = (measured * exact).sum() / exact.square().sum()
    assert abs(slope - 1) < 0.1, f"the effect arrives {slope:.3f} times as large"


# ---- what is kept ----


@orders
def test_nothing_of_the_weights_size_is_saved_but_the_weight(order):
    K, N = 60, 50
    weight = torch.randn(K, N)
    A, B, row, col = (t.requires_grad_() for t in trained_factors(weight.T))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bora_embedding(torch.tensor([1, 2]), weight, A, B, row, col, scaling=SCALING, norm_order=order)
    large = {t.untyped_storage().data_ptr() for t in saved if t.untyped_storage().nbytes() >= weight.nbytes}
    assert large <= {weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@orders
def test_merged_weight_is_rounded_once(dtype, order):
    """An ulp at most, and the little that sums in float32 add before."""
    weight = torch.randn(10, 6, 3).to(dtype)
    factors = trained_factors(weight)
    merged = merged_weight(weight, *factors, order)
    exact = dense_conv_weight(weight.double(), *double(*factors), norm_order=order)
    assert merged.dtype == dtype
    error = (merged.double() - exact).abs() / exact.abs()
    assert error.max() <= torch.finfo(dtype).eps + 2e-6


@orders
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize("shape", [(4, 40000, 1), (40000, 4, 1), (30, 20, 9)], ids=str)
def test_merged_weight_of_an_untrained_layer_is_the_weight(shape, dtype, order):
    """To the bit, also of a view with strides like an embedding's."""
    weight = torch.randn(shape).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    A, B = torch.randn(2, *shape[1:]), torch.zeros(shape[0], 2)
    assert torch.equal(merged_weight(weight, A, B, *norms(weight, A, B), order), weight)


def test_zero_rows_and_columns_give_zeros_and_finite_gradients():
    weight = torch.randn(6, 5, 2)
    weight[3], weight[:, 1] = 0.0, 0.0
    A, B = torch.randn(2, 5, 2), torch.randn(6, 2)
    A[:, 1], B[3] = 0.0, 0.0
    row, col = norms(weight, A, B)
    assert row[3] == 0 and col[1] == 0
    leaves = [t.requires_grad_() for t in (A, B, row, col)]
    y = bora_conv(torch.randn(2, 5, 4), weight, *leaves, None, F.conv1d, scaling=SCALING)
    y.sum().backward()
    assert torch.equal(y[:, 3], torch.zeros(2, 3)) and all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize(
    "options, message",
    [({"norm_order": "rows"}, "norm_order must be one of"), ({"scaling": float("nan")}, "scaling must be finite")],
    ids=["norm_order", "scaling"],
)
def test_options_are_checked(options, message):
    weight = torch.randn(6, 5)
    with pytest.raises(ValueError, match=message):
        bora_embedding(torch.tensor([0]), weight.T, *trained_factors(weight), **{"scaling": 1.0, **options})


def test_a_scaling_that_is_trained_is_refused():
    """It is an option, of which there is no gradient, or one of a part of its effects."""
    weight, x = torch.randn(6, 5), torch.randn(2, 5)
    factors = trained_factors(weight)
    calls = {
        "linear": lambda s: bora_linear(x, weight, *factors, scaling=s),
        "embedding": lambda s: bora_embedding(torch.tensor([0]), weight.T, *factors, scaling=s),
        "convolution": lambda s: bora_conv(
            x[..., None], weight[..., None], factors[0][..., None], *factors[1:], None, F.conv1d, scaling=s
        ),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match="scaling must be a number, got a tensor that requires a gradient"):
            call(torch.tensor(0.5, requires_grad=True))
        assert torch.equal(call(torch.tensor(0.5)), call(0.5))


def test_a_weight_that_requires_a_gradient_is_refused():
    weight = nn.Parameter(torch.randn(6, 5))
    with pytest.raises(ValueError, match="weight must be frozen"):
        bora_embedding(torch.tensor([0]), weight.T, *trained_factors(weight.detach()), scaling=1.0)
