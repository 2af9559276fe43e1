"""What the layer needs of the adapted weight V itself: norms, scales, W', and the exact gradient's paths, in blocks.

V = W0 + s·B·A is made in blocks of rows and never whole. Equations and their numbers are those of ``torch_backend``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..contract import CHUNK_ELEMENTS, COMPLETE, Completion, Scales, accumulation_dtype
from ..rounding import round_weight

_CACHED_ELEMENTS = 1 << 18  # of a block on a CPU that is passed over several times: it stays in the cache


def norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row norms [N] and column norms [K] of a weight, made in blocks of rows in the accumulation dtype.

    Those of a DTensor are reduced over its shards.
    """
    dtype = accumulation_dtype(weight.dtype)
    if hasattr(weight, "placements"):
        squares = weight.detach().to(dtype).square()
        return squares.sum(1).sqrt(), squares.sum(0).sqrt()
    row_norm = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    col_squares = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    step = block_rows(weight)
    for start in range(0, weight.shape[0], step):
        squares = weight[start : start + step].to(dtype).square()
        row_norm[start : start + step] = squares.sum(1).sqrt()
        col_squares += squares.sum(0)
    return row_norm, col_squares.sqrt()


def norms_and_scales(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    *,
    scaling: float,
    norm_order: str,
    eps: float,
    complete: Completion = COMPLETE,
) -> Scales:
    """Norms and scales of the adapted weight, in float32 (float64 for a float64 weight).

    ``complete`` is for a weight that is a shard of a larger one: the norms are those of the whole.
    """
    if magnitude_row is None:
        return Scales()
    rows_first = norm_order == "row_col" or magnitude_col is None
    dtype = accumulation_dtype(weight.dtype)
    V, P, Q = first_second(weight, lora_A, lora_B, rows_first)
    m_first, m_second = (magnitude_row, magnitude_col) if rows_first else (magnitude_col, magnitude_row)
    complete_first, complete_second = complete if rows_first else reversed(complete)
    first_norm = torch.empty(V.shape[0], dtype=dtype, device=weight.device)
    second_squares = torch.zeros(V.shape[1], dtype=dtype, device=weight.device)
    if complete_first is not None:  # before the other axis can be scaled, which takes a second sweep
        for V_rows, norm in _blocks(V, P, Q, scaling, dtype, first_norm):
            torch.sum(V_rows.square_(), 1, out=norm)
        first_norm = complete_first(first_norm).sqrt().clamp_min(eps)
    if complete_first is None or m_second is not None:
        for V_rows, norm, m in _blocks(V, P, Q, scaling, dtype, first_norm, m_first):
            if complete_first is None:
                torch.sum(V_rows.square(), 1, out=norm).sqrt_().clamp_min_(eps)
            if m_second is not None:
                second_squares += V_rows.mul_((m / norm)[:, None]).square_().sum(0)
    first_scale = m_first.to(dtype) / first_norm
    if m_second is None:
        return Scales(first_norm, first_scale)
    if complete_second is not None:
        second_squares = complete_second(second_squares)
    second_norm = second_squares.sqrt().clamp_min(eps)
    second_scale = m_second.to(dtype) / second_norm
    if rows_first:
        return Scales(first_norm, first_scale, second_norm, second_scale)
    return Scales(second_norm, second_scale, first_norm, first_scale)


def effective_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    *,
    scaling: float,
    norm_order: str,
    eps: float,
    complete: Completion = COMPLETE,
    offset: tuple[int, int] = (0, 0),
) -> Tensor:
    """W' = diag(a)·V·diag(g), made in blocks of rows in float32 and rounded once to the weight's dtype.

    ``offset`` is the row and the column of a larger weight where this shard of it starts; see ``round_weight``.
    """
    scales = norms_and_scales(
        weight, lora_A, lora_B, magnitude_row, magnitude_col,
        scaling=scaling, norm_order=norm_order, eps=eps, complete=complete,
    )  # fmt: skip
    merged, dtype, start = torch.empty_like(weight), accumulation_dtype(weight.dtype), 0
    for V, out in _blocks(weight, lora_B, lora_A.T, scaling, dtype, merged):
        if scales.row_scale is not None:
            V.mul_(scales.row_scale[start : start + V.shape[0], None])
        V = V if scales.col_scale is None else V.mul_(scales.col_scale)
        out.copy_(round_weight(V, weight.dtype, (offset[0] + start, offset[1])))
        start += V.shape[0]
    return merged


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
    """Equations (8) to (11): S and D, that of the first axis as S'_first, and what the norms add to dA and dB.

    For a shard of a weight the sum of the second axis must be complete; that of the first is completed here.
    """
    rows_first = norm_order == "row_col" or scales.col_norm is None
    row, col = (scales.row_norm, scales.row_scale, S), (scales.col_norm, scales.col_scale, D)
    (first_norm, first_scale, S_first), (second_norm, second_scale, S_second) = (row, col) if rows_first else (col, row)
    W, P, Q = first_second(weight, lora_A, lora_B, rows_first)
    acc = first_norm.dtype
    P, Q = P.to(acc), Q.to(acc)
    S_first, scale = S_first.clone(), first_scale[:, None]
    if S_second is not None:
        kappa = torch.where((second_norm > eps) & (second_scale != 0), -S_second / second_norm.square(), 0.0)
    if complete_first is not None:
        if S_second is not None:
            for V, a, S_rows in _blocks(W, P, Q, scaling, acc, scale, S_first):
                S_rows.addmv_(V.mul_(a).square_(), kappa)  # (8)
        S_first = complete_first(S_first)
    # V = first_norm⊙U and H = first_scale⊙V = m⊙U make the two terms of (10) and (11) one: dH = U⊙(m⊗κ − S'_first / m).
    m = first_scale * first_norm
    divisor = torch.where((first_norm > eps) & (m != 0), m, torch.inf)  # (9) is 0 there, but for NaN
    dP, dQ_t = torch.empty_like(P), P.new_zeros(P.shape[1], Q.shape[0])
    vectors = (1 / first_norm[:, None], m[:, None], S_first, divisor)
    for V, inverse, m_rows, S_rows, divisor_rows, P_rows, out in _blocks(
        W, P, Q, scaling, acc, *vectors, scale * P, dP
    ):
        U = V.mul_(inverse)
        if complete_first is None and S_second is not None:
            S_rows.addcmul_(U.square() @ kappa, m_rows[:, 0].square())  # (8)
        minus_dm = -(S_rows / divisor_rows)[:, None]  # (9)
        dH = U.mul_(minus_dm if S_second is None else (m_rows * kappa).add_(minus_dm))
        torch.mm(dH, Q, out=out)  # (10)
        dQ_t.addmm_(P_rows.T, dH)  # (11)
    dP, dQ_t = scaling * scale * dP, scaling * dQ_t
    if rows_first:
        return S_first, S_second, dQ_t, dP
    return S_second, S_first, dP.T, dQ_t.T


def first_second(weight: Tensor, lora_A: Tensor, lora_B: Tensor, rows_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """W [first, second] and the factors P [first, R], Q [second, R]: views only."""
    return (weight, lora_B, lora_A.T) if rows_first else (weight.T, lora_A.T, lora_B)


def _blocks(
    W: Tensor, P: Tensor, Q: Tensor, scaling: float, dtype: torch.dtype, *others: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """V = W + s·P·Qᵀ in blocks of rows, each with these rows of the other tensors.

    All blocks share one buffer, because fresh pages cost a CPU more than the passes.
    """
    Q_t, step = Q.to(dtype).T, block_rows(W)
    buffer = torch.empty(min(step, W.shape[0]), W.shape[1], dtype=dtype, device=W.device)
    for W_rows, P_rows, *rows in zip(*(t.split(step) for t in (W, P.to(dtype), *others)), strict=True):
        yield torch.addmm(W_rows.to(dtype), P_rows, Q_t, alpha=scaling, out=buffer[: len(W_rows)]), *rows


def block_rows(matrix: Tensor) -> int:
    elements = _CACHED_ELEMENTS if matrix.device.type == "cpu" else CHUNK_ELEMENTS
    return max(1, elements // max(1, matrix.shape[1]))
