"""Norms of a sharded weight, and the exact gradient's paths through them.

Equations and their numbers are those of ``torch_backend``. On kernels V is never formed: every sum over it is one of
``triton_backend.weighted_sums``, and for a shard a part of that over the whole weight where that axis is sharded.
Vectors and thin matrices in between are PyTorch operations. The other backend makes V in blocks (``adapted_weight``).

S and D appear as the magnitudes' gradients that are made of them. With dm = S / m and the scale m / norm the
coefficients of (8) and (9) are −S / norm² = −dm·scale / norm, which is 0 for a zero magnitude, as it has to be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...contract import Adapter, Completion, Options, Scales, given
from .. import adapted_weight
from ..adapted_weight import first_second


def norms_and_scales(weight: Tensor, adapter: Adapter, options: Options, complete: Completion) -> Scales:
    """Norms and scales of the whole weight; from kernels with the products that ``add_norm_paths`` takes.

    A product is a partial sum over the shards where the axis summed over is sharded.
    """
    if options.backend != "triton":
        return adapted_weight.norms_and_scales(weight, adapter, options, complete=complete, judge=True)
    from ..triton_backend import weighted_sums  # Triton is imported only when it is used

    rows_first = adapter.members.rows_first(options.norm_order)
    W, P, Q = first_second(weight, adapter, rows_first)
    m_first, m_second = adapter.magnitudes(rows_first)
    complete_first, complete_second = complete if rows_first else reversed(complete)
    squares, first_product, cancelled = weighted_sums(W, P, Q, None, scaling=options.scaling)
    first = _norm_and_scale(squares, m_first, complete_first, options.eps)
    second: tuple[Tensor | None, Tensor | None] = (None, None)
    second_product = None
    if m_second is not None:
        squares, second_product, more = weighted_sums(W.T, Q, P, first[1].square(), cancelled, scaling=options.scaling)
        cancelled = cancelled + more
        second = _norm_and_scale(squares, m_second, complete_second, options.eps)
    if rows_first:
        return Scales(*first, *second, cancelled, first_product, second_product)
    return Scales(*second, *first, cancelled, second_product, first_product)


def _norm_and_scale(
    squares: Tensor, magnitude: Tensor, complete: Callable[[Tensor], Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    squares = squares if complete is None else complete(squares)
    norm = squares.clamp_min_(0.0).sqrt_().clamp_min_(eps)  # negative by rounding, at most
    return norm, magnitude / norm


def add_norm_paths(
    weight: Tensor,
    adapter: Adapter,
    scales: Scales,
    dm_row: Tensor | None,
    dm_col: Tensor | None,
    dA: Tensor | None,
    dB: Tensor | None,
    options: Options,
    complete_first: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations (8) to (11): dm_row, dm_col, dA and dB with what flows through the norms.

    For a shard the magnitude's gradient of the second axis must be complete; that of the first is completed here.
    """
    if options.backend != "triton":
        dm_row, dm_col, dA_norm, dB_norm = adapted_weight.norm_paths(
            weight, adapter, scales, dm_row, dm_col, options, complete_first=complete_first
        )
        return dm_row, dm_col, None if dA is None else dA + dA_norm, None if dB is None else dB + dB_norm
    from ..triton_backend import weighted_sums

    scaling, eps, rows_first = options.scaling, options.eps, scales.members.rows_first(options.norm_order)
    row = scales.row_norm, scales.row_scale, scales.row_product, dm_row
    col = scales.col_norm, scales.col_scale, scales.col_product, dm_col
    first, second = (row, col) if rows_first else (col, row)
    first_norm, first_scale, first_product, dm_first = map(given, first)
    *_, dm_second = second
    W, P, Q = first_second(weight, adapter, rows_first)
    first_ratio = first_scale / first_norm
    if dm_second is not None:  # of κ and λ, and what is made of them, the negative
        second_norm, second_scale, second_product, dm_second = map(given, second)
        kappa = _unless_clamped(dm_second * (second_scale / second_norm), second_norm, eps)
        squares, products, _ = weighted_sums(W, P, Q, kappa, scales.cancelled, scaling=scaling, signed=True)
        dm_first = torch.addcmul(dm_first, first_ratio, squares, value=-1.0)  # (8)
    if complete_first is not None:
        dm_first = complete_first(dm_first)
    lam = _unless_clamped(dm_first * first_ratio, first_norm, eps)  # (9)
    dP = lam[:, None] * first_product  # (10)
    _, dQ, _ = weighted_sums(W.T, Q, P, lam, scales.cancelled, scaling=scaling, signed=True)
    if dm_second is not None:
        dP.addcmul_(first_scale.square()[:, None], products)
        dQ.addcmul_(kappa[:, None], second_product)  # (11)
    dA_norm, dB_norm = (dQ.T, dP) if rows_first else (dP.T, dQ)
    dA = None if dA is None else dA.sub_(dA_norm, alpha=scaling)
    dB = None if dB is None else dB.sub_(dB_norm, alpha=scaling)
    return (dm_first, dm_second, dA, dB) if rows_first else (dm_second, dm_first, dA, dB)


def _unless_clamped(coefficient: Tensor, norm: Tensor, eps: float) -> Tensor:
    """The coefficient, in place, 0 where the norm is constant."""
    return coefficient.masked_fill_(norm <= eps, 0.0)
