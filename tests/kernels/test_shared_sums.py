"""Sums of layers that read one x, in one pass, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from bora_kernels.kernels.shared_sums import Share, shared_sums

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}  # to the nearest, once


def make(M, C, ranks, dtype, device, word=None, totals=(True, True, True)):
    x, *dxs = (torch.randn(M, C, device=device).to(dtype) for _ in range(1 + len(ranks)))
    vs = [torch.randn(M, R, device=device) if R else None for R in ranks]
    return x, [Share(dx, v, total, word) for dx, v, total in zip(dxs, vs, totals, strict=False)]


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(x, shares, factor_error, precision="ieee"):
    exact = [share.dx.double() for share in shares]
    first = shares[0].dx
    dx, sums = shared_sums(x, shares, precision=precision)
    assert dx is first and len(sums) == len(shares)
    added = 2**-23 * sum(each.abs() for each in exact)  # in float32
    assert ((dx.double() - sum(exact)).abs() <= ROUNDING[x.dtype] * sum(exact).abs() + added).all(), "rounded twice"
    for share, own, (factor_parts, total_parts) in zip(shares, exact, sums, strict=True):
        assert (factor_parts is None) == (share.v is None) and (total_parts is None) == (not share.total)
        if factor_parts is not None:
            assert relative(factor_parts.sum(0), x.double().T @ share.v.double()) <= factor_error
        if total_parts is not None:
            bound = 1e-6 * (x.double() * own).norm(dim=0) * len(x) ** 0.5
            assert ((total_parts.double().sum(0) - (x.double() * own).sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("ranks", [(3, 17), (0, 4), (1, 2, 3), (16, 0, 5), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("M, C", [(1, 7), (37, 75), (150, 130)])
def test_float32(M, C, ranks, device):
    check(*make(M, C, ranks, torch.float32, device), factor_error=2e-6)


@pytest.mark.parametrize("ranks", [(3, 64), (16, 24, 5)], ids=str)
def test_bfloat16(ranks, device):
    check(*make(150, 130, ranks, torch.bfloat16, device), factor_error=4e-3)  # v is rounded to a term of 9 bits


def test_only_what_is_asked_for(device):
    check(*make(40, 50, (2, 3, 0), torch.float32, device, totals=(False, True, False)), factor_error=2e-6)


def test_rows_of_x_that_lie_apart(device):
    x, shares = make(40, 50, (2, 3), torch.float32, device)
    apart = torch.randn(40, 3, 50, device=device)
    apart[:, 1] = x
    check(apart[:, 1], shares, factor_error=2e-6)


def test_two_terms_of_v_where_lines_are_cancelled(device):
    for word, error in ((torch.zeros(2), 4e-3), (torch.tensor([0.0, 1.0]), 2e-5)):
        check(*make(150, 70, (3, 20), torch.bfloat16, device, word=word.to(device)), factor_error=error)
    x, shares = make(150, 70, (3, 20), torch.bfloat16, device)
    (factor_parts, _), _ = shared_sums(x, shares, precision="ieee")[1]
    assert relative(factor_parts.sum(0), x.double().T @ shares[0].v.double()) > 1e-4  # what the word is there for


def test_the_same_bits_again(device):
    x, shares = make(150, 130, (16, 24, 5), torch.bfloat16, device)
    again = [share._replace(dx=share.dx.clone()) for share in shares]
    first, second = shared_sums(x, shares, precision="ieee"), shared_sums(x, again, precision="ieee")
    assert torch.equal(first[0], second[0])
    for one, other in zip(first[1], second[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
