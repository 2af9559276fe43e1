"""Norms of a sharded weight and the exact gradient's paths through them, from the kernels' sums over this rank's shard.

The functions take and return what those of ``adapted_weight`` do; equations are those of ``factored``. V is never
formed: every sum over it is one of ``fused.weighted_sums``, and for a shard a part of that over the whole weight where
the axis summed over is sharded. Vectors and thin matrices in between are PyTorch operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..adapted_weight import first_second
from ..fused import weighted_sums
from ..plan import COMPLETE, Completion, Scales


def norms_and_scales(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor,
    magnitude_col: Tensor | None,
    *,
    scaling: float,
    norm_order: str,
    eps: float,
    complete: Completion = COMPLETE,
) -> Scales:
    """Norms and scales, and the products that ``norm_paths`` takes: parts, where the sum behind them is one."""
    rows_first = norm_order == "row_col" or magnitude_col is None
    W, P, Q = first_second(weight, lora_A, lora_B, rows_first)
    m_first, m_second = (magnitude_row, magnitude_col) if rows_first else (magnitude_col, magnitude_row)
    complete_first, complete_second = complete if rows_first else reversed(complete)
    squares, first_product = weighted_sums(W, P, Q, None, scaling=scaling)
    first = _norm_and_scale(squares, m_first, complete_first, eps)
    if m_second is None:
        return Scales(*first, row_product=first_product)
    squares, second_product = weighted_sums(W.T, Q, P, first[1].square(), scaling=scaling)
    second = _norm_and_scale(squares, m_second, complete_second, eps)
    if rows_first:
        return Scales(*first, *second, first_product, second_product)
    return Scales(*second, *first, second_product, first_product)


def _norm_and_scale(
    squares: Tensor, magnitude: Tensor, complete: Callable[[Tensor], Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    squares = squares if complete is None else complete(squares)
    norm = squares.clamp_min(0.0).sqrt().clamp_min(eps)  # negative by rounding, at most
    return norm, magnitude.to(norm.dtype) / norm


def norm_paths(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scales: Scales,
    S: Tensor,
    D: Tensor | None,
    norm_order: str,
    scaling: float,
    eps: float,
    complete_first: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Equations (8) to (11): S and D, that of the first axis as S'_first, and what the norms add to dA and dB."""
    rows_first = norm_order == "row_col" or scales.col_norm is None
    row = scales.row_norm, scales.row_scale, S, scales.row_product
    col = scales.col_norm, scales.col_scale, D, scales.col_product
    first, second = (row, col) if rows_first else (col, row)
    first_norm, first_scale, S_first, first_product = first
    second_norm, second_scale, S_second, second_product = second
    W, P, Q = first_second(weight, lora_A, lora_B, rows_first)
    dP = dQ = 0.0
    if S_second is not None:
        kappa = _coefficient(S_second, second_norm, second_scale, eps)
        squares, products = weighted_sums(W, P, Q, kappa, scaling=scaling)
        S_first = S_first + first_scale.square() * squares  # (8)
        dP = (scaling * first_scale.square())[:, None] * products
        dQ = (scaling * kappa)[:, None] * second_product
    if complete_first is not None:
        S_first = complete_first(S_first)
    lam = _coefficient(S_first, first_norm, first_scale, eps)  # (9)
    dP = dP + (scaling * lam)[:, None] * first_product  # (10)
    _, products = weighted_sums(W.T, Q, P, lam, scaling=scaling)
    dQ = dQ + scaling * products  # (11)
    if rows_first:
        return S_first, S_second, dQ.T, dP
    return S_second, S_first, dP.T, dQ


def _coefficient(total: Tensor, norm: Tensor, scale: Tensor, eps: float) -> Tensor:
    """−S / norm²; a clamped norm passes no gradient, and the true sum of a zero magnitude is zero."""
    return torch.where((norm > eps) & (scale != 0), -total / norm.square(), 0.0)
