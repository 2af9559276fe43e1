"""Norms where ranks are many: terms of a factor, reads of W0 that take them, products apart from the norms' ends."""

import pytest
import torch
from conftest import INTERPRETING
from helpers.accuracy import assert_accurate, assert_equal
from helpers.cases import SCALING, Case, cancelled, check_layer, orders, require, undone

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.kernels import moments_of_terms as module
from bora_kernels.kernels.config import cdiv
from bora_kernels.kernels.moments_config import moments_of_terms_config
from bora_kernels.kernels.products import sums_over
from bora_kernels.ops import triton_backend

pytestmark = pytest.mark.sampled(8)
BF16 = torch.bfloat16
RANKS = (65, 128, 300) if INTERPRETING else (65, 96, 128, 200, 256, 300)
VIEWS = {  # what a descriptor addresses: rows of whole 16 bytes, though not each of them is of the weight
    "rows": lambda W: torch.cat([W, W[:, : -W.shape[1] % 8]], dim=1)[:, : W.shape[1]],
    "columns": lambda W: torch.cat([W.T, W.T[:, : -W.shape[0] % 8]], dim=1)[:, : W.shape[0]].T,
}


def exact_sums(W, P, Z, coefficient):
    """products and squares of V in the dtype of Z."""
    c = torch.ones(len(Z), dtype=Z.dtype, device=Z.device) if coefficient is None else coefficient.to(Z.dtype)
    W = W.to(Z.dtype)
    V = W + SCALING * P.to(Z.dtype) @ Z.T
    return {"products": V @ (c[:, None] * Z), "squares": V.square() @ c}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("view", VIEWS)
def test_sums_of_w0(view, R, weighted, device, monkeypatch):
    """Over odd sizes and as many splits as are asked for: X, G, squares, the same without squares, and each time."""
    require("triton", BF16)
    I, J = 45, 275
    W, Z = VIEWS[view](torch.randn(I, J, device=device).to(BF16)), torch.randn(J, R, device=device)
    coefficient = torch.randn(J, device=device) if weighted else None
    assert module.takes_terms(W, R)
    terms, c = Z.double(), torch.ones(J, device=device) if coefficient is None else coefficient
    exact = {"X": W.double() @ (c[:, None] * terms), "G": terms.T @ (c[:, None] * terms)}
    exact["squares"] = W.double().square() @ c.double()
    plain = {"X": W.float() @ (c[:, None] * Z), "G": Z.T @ (c[:, None] * Z), "squares": W.float().square() @ c}
    for splits in (1, 3):
        config = moments_of_terms_config(0 if INTERPRETING else 90, 132, I, J, R, view == "columns")[1]
        monkeypatch.setattr(module, "moments_of_terms_config", lambda *_, made=(splits, config): made)
        cleared = torch.ones(4, device=device)
        products, squares = module.moments_of_terms(W, Z, coefficient, cleared=cleared)
        assert products.shape == (splits, I + R, R) and squares.shape == (splits, I) and not cleared.any()
        actual = {"X": products[:, :I].sum(0), "G": products[0, I:], "squares": squares.sum(0)}
        bounds = exact | {"squares": W.double().square().sum(1) * 2}
        assert_accurate(actual, plain, exact, samples=R * R, terms=bounds, floor=2.0**-17)
        again, none = module.moments_of_terms(W, Z, coefficient, squares_needed=False)
        assert none is None
        assert_equal([again[:, :I], again[0, I:]], [products[:, :I], products[0, I:]])


@pytest.mark.parametrize("R", [65, 100])
def test_products_and_squares_of_v(R, device):
    """Equations (a) and (b) before norms are finished: in memory of their own, over X, or squares alone."""
    require("triton", BF16)
    I, J = 72, 48
    W, P, Z = (
        torch.randn(I, J, device=device).to(BF16),
        torch.randn(I, R, device=device),
        torch.randn(J, R, device=device),
    )
    c, out = torch.rand(J, device=device), torch.empty(I, R, device=device)
    exact, plain = exact_sums(W, P.double(), Z.double(), c), exact_sums(W, P, Z, c)
    apart = sums_over(W, P, Z, c, SCALING, "ieee", out=out)
    assert apart.groups == 2 and len(apart.squares) == apart.splits + 2
    actual = {"products": out, "squares": apart.squares.sum(0)}
    assert_accurate(actual, plain, exact, samples=I, floor=2.0**-17)
    within = sums_over(W, P, Z, c, SCALING, "ieee", in_place=True)
    alone = sums_over(W, P, Z, c, SCALING, "ieee")
    unwanted = sums_over(W, P, Z, c, SCALING, "ieee", squares_needed=False, in_place=True)
    assert unwanted.squares is None
    over_x, without_squares = (sums.products.flatten()[: I * R].view(I, R) for sums in (within, unwanted))
    assert torch.equal(over_x, out)
    torch.testing.assert_close(without_squares, out, rtol=1e-6, atol=1e-6)  # another kernel: its sums may be fused
    assert torch.equal(within.squares, apart.squares)
    rounding = 1e-6 * apart.squares.abs().max().item()
    torch.testing.assert_close(alone.squares, apart.squares, rtol=0, atol=rounding)  # another kernel as well


@orders
@pytest.mark.parametrize("R", [65, 130])
def test_layers(R, order, device):
    require("triton", BF16)
    case = Case(9, 48, 88, R, dtype=BF16, order=order, seed=R)
    first = check_layer("triton", case.inputs(device), case.upstream(device), norm_order=order)
    assert_equal(check_layer("triton", case.inputs(device), case.upstream(device), norm_order=order), first)


@orders
@pytest.mark.parametrize("axis", ["row", "col"])
@pytest.mark.parametrize("R, adapter_dtype", [(70, BF16), (132, torch.float32)])
def test_lines_that_the_update_cancels(R, adapter_dtype, axis, order, device):
    """V itself is taken for them, after products were made as for the others."""
    require("triton", BF16)
    case = Case(9, 48, 56, R, dtype=BF16, order=order, seed=R, adapter_dtype=adapter_dtype)
    inputs = case.inputs(device)
    inputs["lora_A"][1:] *= 0.1  # what is left of a line beside the other ranks' update
    check_layer("triton", undone(inputs, axis, 0.05), case.upstream(device), norm_order=order)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_sums_of_a_shard(signed, device):
    """Words of cancelled lines only where there are such lines, never for coefficients of either sign."""
    require("triton", BF16)
    inputs = Case(4, 48, 56, 70, dtype=BF16, bias=False).inputs(device)
    for left, word in ((None, False), (0.01, True)):
        given = inputs if left is None else cancelled(inputs, "row", left)
        W, A, B = given["weight"], given["lora_A"], given["lora_B"]
        c = torch.randn(56, device=device) if signed else torch.rand(56, device=device)
        squares, products, seen = triton_backend.weighted_sums(W, B, A.T, c, scaling=SCALING, signed=signed)
        exact, plain = exact_sums(W, B.double(), A.T.double(), c), exact_sums(W, B, A.T, c)
        terms = exact | {"squares": exact_sums(W, B.double(), A.T.double(), c.abs())["squares"]}
        actual = {"products": products, "squares": squares}
        assert_accurate(actual, plain, exact, samples=48, terms=terms, floor=2.0**-17)
        assert seen.any().item() == (word and not signed)
        if seen.any():  # what is left of the line is known to a fraction of itself
            for name, value in actual.items():
                assert (value[1] - exact[name][1]).norm() <= 1e-3 * exact[name][1].norm(), name


def test_which_weights_are_read_so(device):
    W, odd = (torch.empty(48, columns, dtype=BF16, device=device) for columns in (64, 63))
    for weight, R, takes in (
        (W, 65, True), (W.T, 256, True), (W, 64, False), (W.half(), 100, False), (W.float(), 256, False),
        (W[:, 1:], 100, False), (odd, 100, False),
    ):  # fmt: skip
        assert module.takes_terms(weight, R) == takes, (weight.stride(), weight.dtype, R)


WIDTHS = (512, 640, 896, 1024, 2048, 3584, 4096, 4864, 8192, 14336, 18944)


@pytest.mark.parametrize("R", [96, 128, 200, 512])
def test_no_more_splits_would_do_less_each_in_as_many_waves(R):
    """Over all pairs of widths; and no split is empty."""
    for I in WIDTHS:
        for J in WIDTHS:
            splits, config = moments_of_terms_config(90, 132, I, J, R, False)
            steps, slots = cdiv(J, config["BLOCK_SIZE_J"]), 132
            blocks = cdiv(I, config["BLOCK_SIZE_I"]) * cdiv(R, config["BLOCK_SIZE_R"])
            assert 1 <= splits <= 16 and (splits - 1) * cdiv(steps, splits) < steps
            for more in range(splits + 1, min(16, steps) + 1):
                waves, more_waves = cdiv(blocks * splits, slots), cdiv(blocks * more, slots)
                assert more_waves > waves or cdiv(steps, more) == cdiv(steps, splits), (I, J, splits, more)


def test_splits_that_were_measured_to_be_best_are_chosen():
    """On an H200: of those that were tried the fastest, or within 2 % of it with fewer parts."""
    for (I, J, R), best in (
        ((4096, 4096, 256), {4}), ((14336, 4096, 256), {1, 2}), ((4096, 14336, 256), {4}), ((4096, 4096, 128), {4}),
        ((3584, 18944, 96), {9}), ((18944, 3584, 96), {3, 4}),
    ):  # fmt: skip
        assert moments_of_terms_config(90, 132, I, J, R, False)[0] in best, (I, J, R)
