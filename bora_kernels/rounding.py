"""Rounding to half precision with a fixed dither for each element, so that small updates are not lost.

Rounding to the nearest loses every change below half a unit in the last place of what it changes. With a dither u in
[0, 1) a value that lies the fraction f of the way to the next one goes there where u + f ≥ 1: an error of less than one
unit, zero on average, the same each time. u is the two-dimensional R2 sequence, which is even along rows, columns and
both; ``kernels.common.round_with_dither`` is the same in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DITHER_ROW, _DITHER_COL = 0xC13FA9A9, 0x91E10DA5  # steps of the sequence, in units of 2⁻³²
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of a float32 mantissa; below 2⁻¹⁴ float16 drops more
_SPARE_BITS = 6  # of those: what float32 norms may err, and what ``round_weight`` takes for it

HALF_PRECISION = tuple(_DROPPED_BITS)


def fold(t: Tensor, scale: Tensor | None) -> Tensor:
    """t⊙scale [M, C] in t's dtype: rounded with dither in half precision, so that a scale near 1 is not lost."""
    if scale is None:
        return t
    if t.dtype not in _DROPPED_BITS:
        return t * scale.to(t.dtype)
    wide = t.float() * scale
    return _round(wide, t.dtype, _noise(wide, t.dtype, (0, 0)))


def round_weight(wide: Tensor, dtype: torch.dtype, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """A weight [N, K] in ``dtype``, rounded with dither where it is float32 and that is half precision.

    A value within 2⁻¹⁹ relative of one that ``dtype`` holds counts as that value: a layer whose magnitudes are its
    weight's norms has scales of 1 only to within the rounding of those norms, and its W' is W0 to the bit.

    Where the matrix is part of a larger one, ``offset`` is the row and the column that it starts at.
    """
    if dtype not in _DROPPED_BITS or wide.dtype != torch.float32:
        return wide.to(dtype)
    half = 1 << (_SPARE_BITS - 1)
    noise = (_noise(wide, dtype, offset) & -2 * half) | half  # its low bits round to the nearest
    return _round(wide, dtype, noise)


def _noise(wide: Tensor, dtype: torch.dtype, offset: tuple[int, int]) -> Tensor:
    """The dither of each element: an integer from 0 to 2^bits − 1 for the bits that ``dtype`` drops."""
    bits = _DROPPED_BITS[dtype]
    rows, cols = (
        (torch.arange(start, start + size, device=wide.device) * step).to(torch.int32)  # wraps modulo 2³²
        for start, size, step in zip(offset, wide.shape, (_DITHER_ROW, _DITHER_COL), strict=True)
    )
    return ((rows[:, None] + cols) >> (32 - bits)) & ((1 << bits) - 1)


def _round(wide: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    rounded = ((wide.view(torch.int32) + noise) & -(1 << _DROPPED_BITS[dtype])).view(torch.float32)
    return torch.where(torch.isnan(wide), wide, rounded).to(dtype)
