"""The specification itself: against loops over plain floats, numerical derivatives and its stated limits."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from bora_kernels.reference import bora_linear_ref, bora_weight_ref

M, N, K, R = 3, 4, 5, 2
SCALING, DROPOUT_P = 0.7, 0.25
NORMED = [("row_col", "bora"), ("col_row", "bora"), ("row_col", "dora")]
CASES = [*NORMED, ("row_col", "lora")]
all_cases = pytest.mark.parametrize("norm_order, member", CASES, ids=map("-".join, CASES))
normed_cases = pytest.mark.parametrize("norm_order, member", NORMED, ids=map("-".join, NORMED))
both_orders = pytest.mark.parametrize("norm_order", ["row_col", "col_row"])
both_conventions = pytest.mark.parametrize("detach_norm", [False, True], ids=["exact", "detached"])
with_and_without_bias = pytest.mark.parametrize("has_bias", [False, True], ids=["nobias", "bias"])
with_and_without_mask = pytest.mark.parametrize("has_mask", [False, True], ids=["nodrop", "dropout"])


def make_weights(member="bora", dtype=torch.float64):
    """Arguments of bora_weight_ref as leaves; one magnitude of each kind is negative."""
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    tensors = {"weight": randn(N, K), "lora_A": randn(R, K), "lora_B": randn(N, R)}
    tensors |= {"magnitude_row": randn(N), "magnitude_col": randn(K)}
    for name in ("magnitude_row", "magnitude_col"):
        tensors[name] = tensors[name].abs() + 0.5
        tensors[name][1] *= -1
    absent = {"bora": (), "dora": ("magnitude_col",), "lora": ("magnitude_row", "magnitude_col")}[member]
    return {n: None if n in absent else t.to(dtype).requires_grad_() for n, t in tensors.items()}


def make_x(*shape, seed=1, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def make_mask():
    """A keep-mask of [M, K] with kept and dropped entries in every row."""
    return torch.arange(M * K).view(M, K) % 3 != 0


def present(**tensors):
    return {name: t for name, t in tensors.items() if t is not None}


def loop_layer(x, tensors, norm_order, bias=None, mask=None, dropout_p=0.0, eps=1e-12):
    """y, row norms and column norms, one plain float at a time; norms are None where the member has none."""
    given = (x, *tensors.values(), bias, mask)
    x, W, A, B, m_row, m_col, bias, mask = (None if t is None else t.tolist() for t in given)
    update = [[SCALING * sum(B[n][r] * A[r][k] for r in range(R)) for k in range(K)] for n in range(N)]
    V = [[W[n][k] + update[n][k] for k in range(K)] for n in range(N)]
    a, g, row_norm, col_norm = [1.0] * N, [1.0] * K, None, None
    for step in {"row_col": "rc", "col_row": "cr"}[norm_order]:
        H = [[a[n] * V[n][k] * g[k] for k in range(K)] for n in range(N)]
        if step == "r" and m_row:
            row_norm = [max(eps, math.sqrt(sum(H[n][k] ** 2 for k in range(K)))) for n in range(N)]
            a = [m_row[n] / row_norm[n] for n in range(N)]
        if step == "c" and m_col:
            col_norm = [max(eps, math.sqrt(sum(H[n][k] ** 2 for n in range(N)))) for k in range(K)]
            g = [m_col[k] / col_norm[k] for k in range(K)]
    y = [[bias[n] if bias else 0.0 for n in range(N)] for _ in x]
    for m, row in enumerate(x):
        for n in range(N):
            for k in range(K):
                dropped = row[k] if mask is None else row[k] / (1 - dropout_p) if mask[m][k] else 0.0
                y[m][n] += a[n] * g[k] * (row[k] * W[n][k] + dropped * update[n][k])
    return tuple(None if v is None else torch.tensor(v, dtype=torch.float64) for v in (y, row_norm, col_norm))


# ---- values ----


@all_cases
@both_conventions
def test_weight_is_the_loop(norm_order, member, detach_norm):
    tensors = make_weights(member)
    options = {"scaling": SCALING, "norm_order": norm_order, "detach_norm": detach_norm}
    expected = loop_layer(torch.eye(K), tensors, norm_order)[0].T
    torch.testing.assert_close(bora_weight_ref(**tensors, **options), expected, rtol=1e-13, atol=1e-14)


@all_cases
@with_and_without_bias
@with_and_without_mask
def test_linear_is_the_loop(norm_order, member, has_bias, has_mask):
    x, tensors = make_x(M, K), make_weights(member)
    extras = {"bias": make_x(N, seed=2) if has_bias else None, "dropout_p": DROPOUT_P if has_mask else 0.0}
    mask = make_mask() if has_mask else None
    y = bora_linear_ref(x, **tensors, **extras, scaling=SCALING, norm_order=norm_order, dropout_mask=mask)
    expected, _, _ = loop_layer(x, tensors, norm_order, mask=mask, **extras)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-14)


@both_orders
def test_starts_at_the_base_weight(norm_order):
    tensors = make_weights()
    weight = tensors["weight"]
    tensors |= {"lora_B": 0 * tensors["lora_B"]}
    tensors |= {"magnitude_row": weight.norm(dim=1), "magnitude_col": weight.norm(dim=0)}
    effective = bora_weight_ref(**tensors, scaling=SCALING, norm_order=norm_order)
    torch.testing.assert_close(effective, weight, rtol=1e-14, atol=0)


def test_drawn_dropout_keeps_and_rescales():
    size = 128  # the layer is drop(x): no base, and factors that multiply to the identity
    eye = torch.eye(size)
    torch.manual_seed(0)
    x = torch.ones(size, size)
    for options, kept in (({"training": True}, 0.75), ({"training": False}, 1.0)):
        y = bora_linear_ref(x, torch.zeros_like(eye), eye, eye, scaling=1.0, dropout_p=DROPOUT_P, **options)
        torch.testing.assert_close(y.max(), torch.tensor(1 / kept))
        assert ((y == 0) | (y == y.max())).all()
        assert abs((y != 0).double().mean().item() - kept) <= 5 * math.sqrt(kept * (1 - kept)) / size


# ---- derivatives ----


@all_cases
@with_and_without_bias
@with_and_without_mask
def test_exact_gradient_is_numerical(norm_order, member, has_bias, has_mask):
    inputs = present(x=make_x(2, K), **make_weights(member), bias=make_x(N, seed=2) if has_bias else None)
    options = {"scaling": SCALING, "norm_order": norm_order}
    options |= {"dropout_p": DROPOUT_P, "dropout_mask": make_mask()[:2]} if has_mask else {}

    def layer(*values):
        return bora_linear_ref(**dict(zip(inputs, values, strict=True)), **options)

    assert gradcheck(layer, tuple(inputs.values()))
    assert gradgradcheck(layer, tuple(inputs.values()))


@normed_cases
@with_and_without_mask
def test_detached_gradient_holds_the_norms_constant(norm_order, member, has_mask):
    x, tensors, bias = make_x(M, K), make_weights(member), make_x(N, seed=2)
    inputs = present(x=x, **tensors, bias=bias)
    options = {"scaling": SCALING, "norm_order": norm_order}
    drop = {"dropout_p": DROPOUT_P, "dropout_mask": make_mask()} if has_mask else {}
    y = bora_linear_ref(x, **tensors, bias=bias, detach_norm=True, **options, **drop)

    _, row_norm, col_norm = loop_layer(x, tensors, norm_order)
    a = tensors["magnitude_row"] / row_norm
    g = torch.ones(K) if col_norm is None else tensors["magnitude_col"] / col_norm
    dropped_x = x * make_mask() / (1 - DROPOUT_P) if has_mask else x
    low_rank = SCALING * (dropped_x * g) @ tensors["lora_A"].T @ tensors["lora_B"].T
    expected = a * ((x * g) @ tensors["weight"].T + low_rank) + bias

    def gradients(output):
        return dict(zip(inputs, torch.autograd.grad(output.square().sum(), inputs.values()), strict=True))

    actual = gradients(y)
    torch.testing.assert_close(actual, gradients(expected), rtol=1e-12, atol=1e-13)
    exact = gradients(bora_linear_ref(x, **tensors, bias=bias, **options, **drop))
    assert not torch.allclose(actual["lora_B"], exact["lora_B"], rtol=1e-3)


@both_orders
def test_gradient_through_clamped_norms(norm_order):
    tensors, eps = make_weights(), 1.5
    with torch.no_grad():
        tensors["weight"][1] *= 0.5
        tensors["lora_B"][1] *= 0.5
    expected, row_norm, col_norm = loop_layer(torch.eye(K), tensors, norm_order, eps=eps)
    assert 0 < (row_norm == eps).sum() < N and 0 < (col_norm == eps).sum() < K

    def effective(*values):
        return bora_weight_ref(*values, scaling=SCALING, norm_order=norm_order, eps=eps)

    torch.testing.assert_close(effective(*tensors.values()), expected.T, rtol=1e-13, atol=1e-14)
    assert gradcheck(effective, tuple(tensors.values()))
    assert gradgradcheck(effective, tuple(tensors.values()))


@pytest.mark.parametrize("eps", [1e-12, 2.0])
def test_norm_is_that_of_normalize(eps):
    """Rows first without column magnitudes is F.normalize, a zero row and a row of norm eps included.

    At a norm of eps the gradient is that of a larger norm, of the two that PyTorch's versions have there.
    """
    tensors = make_weights("dora")
    with torch.no_grad():
        tensors["lora_B"].zero_()
        tensors["weight"][0] = 0.0
        tensors["weight"][2] = torch.tensor([eps, 0.0, 0.0, 0.0, 0.0])
    effective = bora_weight_ref(**tensors, scaling=SCALING, eps=eps)
    dy = make_x(N, K, seed=3).detach()

    def normalized(eps):
        return tensors["magnitude_row"][:, None] * F.normalize(tensors["weight"], dim=1, eps=eps)

    wanted = [torch.autograd.grad(W, tensors["weight"], dy)[0] for W in (normalized(eps), normalized(eps / 2))]
    torch.testing.assert_close(effective, normalized(eps), rtol=1e-14, atol=0)
    (actual,) = torch.autograd.grad(effective, tensors["weight"], dy)
    at_eps = int(tensors["weight"][2].norm() == eps)
    wanted[0][2] = wanted[at_eps][2]
    torch.testing.assert_close(actual, wanted[0], rtol=1e-12, atol=1e-14)


# ---- limits ----


@normed_cases
@both_conventions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_row_and_column(norm_order, member, detach_norm, dtype):
    tensors, bias = make_weights(member, dtype), make_x(N, seed=2, dtype=dtype)
    zeros = [("weight", 1), ("lora_B", 1), ("weight", (..., 2)), ("lora_A", (..., 2))]
    if dtype == torch.float16:  # cannot hold magnitude / eps: start where training does, at the norms
        zeros += [("magnitude_row", 1), ("magnitude_col", 2)]
    with torch.no_grad():
        for name, index in zeros:
            if tensors[name] is not None:
                tensors[name][index] = 0.0
    options = {"scaling": SCALING, "norm_order": norm_order, "detach_norm": detach_norm}
    nonzero = bora_weight_ref(**tensors, **options) != 0
    assert not nonzero[1].any() and not nonzero[:, 2].any() and nonzero.sum() == (N - 1) * (K - 1)
    x = make_x(M, K, dtype=dtype)
    y = bora_linear_ref(x, **tensors, bias=bias, **options)
    assert (y[:, 1] == bias[1]).all()

    inputs = present(x=x, **tensors, bias=bias)
    first = torch.autograd.grad(y.sum(), inputs.values(), create_graph=True)
    second = torch.autograd.grad(sum(d.sum() for d in first), inputs.values(), allow_unused=True)
    for name, d1, d2 in zip(inputs, first, second, strict=True):
        assert d1.isfinite().all(), name
        assert d2 is None or dtype == torch.float16 or d2.isfinite().all(), name


@all_cases
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_update_below_half_an_ulp_of_a_bf16_base_survives(norm_order, member, x_dtype):
    tensors = make_weights(member, torch.float32)
    sign = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]])
    tensors["weight"] = torch.ones(N, K, dtype=torch.bfloat16)
    tensors["lora_A"], tensors["lora_B"] = torch.eye(R, K), sign * 2**-10  # half an ulp below 1 is 2^-9
    update = tensors["lora_B"] @ tensors["lora_A"]
    assert ((1 + update).bfloat16() == 1).all() and (update != 0).any()

    effective = bora_weight_ref(**tensors, scaling=1.0, norm_order=norm_order)
    exact = {name: t.double() for name, t in present(**tensors).items()}
    expected = bora_weight_ref(**exact, scaling=1.0, norm_order=norm_order)
    assert effective.dtype == torch.float32
    torch.testing.assert_close(effective.double(), expected, rtol=1e-6, atol=0)

    x = make_x(M, K, dtype=x_dtype)
    y = bora_linear_ref(x, **tensors, scaling=1.0, norm_order=norm_order)
    assert y.dtype == x_dtype
    assert torch.equal(y, F.linear(x, effective.to(x_dtype)))  # W' rounded once, then a plain linear


def test_output_has_the_dtype_of_x_with_bias_and_dropout():
    tensors = make_weights(dtype=torch.float32)
    x, bias = make_x(M, K, dtype=torch.bfloat16), make_x(N, seed=2, dtype=torch.float32)
    drop = {"dropout_p": DROPOUT_P, "dropout_mask": make_mask()}
    y = bora_linear_ref(x, **tensors, bias=bias, scaling=SCALING, **drop)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(K,), (6, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)], ids=str)
@with_and_without_mask
def test_leading_dimensions(shape, has_mask):
    x, tensors, bias = make_x(*shape), make_weights(), make_x(N, seed=2)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5 if has_mask else None
    drop = {"scaling": SCALING, "dropout_p": DROPOUT_P if has_mask else 0.0}
    y = bora_linear_ref(x, **tensors, bias=bias, dropout_mask=mask, **drop)
    assert y.shape == (*shape[:-1], N)
    flat_mask = mask.reshape(-1, K) if has_mask else None
    flat = bora_linear_ref(x.reshape(-1, K), **tensors, bias=bias, dropout_mask=flat_mask, **drop)
    torch.testing.assert_close(y.reshape(-1, N), flat)
    for gradient in torch.autograd.grad(y.sum(), (x, *tensors.values(), bias)):
        assert bool(gradient.any()) == (x.numel() > 0)


ERRORS = {
    "norm_order": ({"norm_order": "rows"}, r"norm_order must be one of \('row_col', 'col_row'\), got 'rows'"),
    "weight": ({"weight": torch.ones(N)}, r"weight must have 2 dimensions, got shape \[4\]"),
    "lora_A": ({"lora_A": torch.ones(K, R)}, r"lora_A must be \[5, 5\], got \[5, 2\]"),
    "lora_B": ({"lora_B": torch.ones(R, N)}, r"lora_B must be \[4, 2\], got \[2, 4\]"),
    "magnitude_row": ({"magnitude_row": torch.ones(1)}, r"magnitude_row must be \[4\], got \[1\]"),
    "magnitude_col": ({"magnitude_col": torch.ones(N)}, r"magnitude_col must be \[5\], got \[4\]"),
    "x": ({"x": torch.ones(M, N)}, r"x must be \[3, 5\], got \[3, 4\]"),
    "bias": ({"bias": torch.ones(K)}, r"bias must be \[4\], got \[5\]"),
    "mask-shape": ({"dropout_mask": torch.ones(K) > 0}, r"dropout_mask must be \[3, 5\], got \[5\]"),
    "mask-dtype": ({"dropout_mask": torch.ones(M, K)}, r"dropout_mask must be torch.bool, got torch.float32"),
    "dropout_p": ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize("wrong, message", ERRORS.values(), ids=ERRORS)
def test_error_names_the_argument(wrong, message):
    with pytest.raises(ValueError, match=message):
        bora_linear_ref(**({"x": make_x(M, K), **make_weights(), "scaling": SCALING} | wrong))
