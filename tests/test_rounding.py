"""Rounding with a fixed dither: what merged weights, and operands with a folded scale, are rounded with."""

import pytest
import torch

from bora_kernels.rounding import fold, round_weight

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
fractions = pytest.mark.parametrize("fraction", [0.03, 0.2, 0.5, 0.9])


def values(dtype, fraction, N=64, K=96):
    """A half-precision matrix, the next values away from zero, and what lies that fraction of the way to them."""
    low = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    low[low.abs() < 2.0**-10] = 1.0  # away from float16's subnormal values
    high = (low.view(torch.int16) + 1).view(dtype)
    return low, high, torch.lerp(low.float(), high.float(), fraction)


def check_share(rounded, low, high, fraction):
    """The fraction went to the next value: of the whole and of each row and column, which scales act on."""
    assert ((rounded == low) | (rounded == high)).all()
    share = (rounded == high).float()
    assert abs(share.mean() - fraction) < 0.01
    for dim in (0, 1):
        assert (share.mean(dim) - fraction).abs().max() < 0.1


@dtypes
@fractions
def test_weight_is_rounded_away_as_often_as_it_lies_away(dtype, fraction):
    low, high, wide = values(dtype, fraction)
    rounded = round_weight(wide, dtype)
    check_share(rounded, low, high, fraction)
    assert torch.equal(rounded, round_weight(wide, dtype))


@dtypes
@fractions
def test_scale_near_one_is_folded_as_often_as_it_lies_away(dtype, fraction):
    low, high = torch.ones(64, 96, dtype=dtype), torch.full((64, 96), 1 + torch.finfo(dtype).eps, dtype=dtype)
    scale = torch.full((96,), 1 + fraction * torch.finfo(dtype).eps)
    check_share(fold(low, scale), low, high, fraction)


@dtypes
def test_values_of_the_dtype_stay(dtype):
    """Also such as are off by what float32 norms err, and infinities, zeros and NaN."""
    low, _, wide = values(dtype, 0.0)
    special = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max]])
    torch.testing.assert_close(round_weight(special, dtype), special.to(dtype), rtol=0, atol=0, equal_nan=True)
    for units in (-31, -8, 0, 8, 31):
        moved = (wide.view(torch.int32) + units).view(torch.float32)
        assert torch.equal(round_weight(moved, dtype), low)


@dtypes
def test_part_of_a_matrix_is_rounded_as_in_the_whole(dtype):
    _, _, wide = values(dtype, 0.4)
    assert torch.equal(round_weight(wide[7:30, 11:40], dtype, (7, 11)), round_weight(wide, dtype)[7:30, 11:40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_plain(dtype):
    wide = torch.randn(5, 4, dtype=dtype)
    assert torch.equal(round_weight(wide, dtype), wide)
    assert torch.equal(fold(wide, wide[0]), wide * wide[0])
    assert fold(wide, None) is wide
