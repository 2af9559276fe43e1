"""What the layer needs of the adapted weight V itself: norms, scales, W', and the exact gradient's paths, in blocks.

V = W0 + s·B·A is made in blocks of rows and never whole. Equations and their numbers are those of ``torch_backend``.

A weight is [N, K], or [N, K·taps] for a convolution's [N, K, taps], whose ``lora_A`` is then [R, K·taps]: the taps of a
column (an input channel) stand side by side and share its norm, its magnitude and its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..contract import CHUNK_ELEMENTS, COMPLETE, Adapter, Completion, Options, Scales, accumulation_dtype, given
from ..rounding import round_weight

_CACHED_ELEMENTS = 1 << 18  # of a block on a CPU that is passed over several times: it stays in the cache


def norms(weight: Tensor, adapter: Adapter | None = None, *, scaling: float = 1.0, taps: int = 1) -> tuple[Tensor, ...]:
    """‖V‖_row [N] and ‖V‖_col [K], what magnitudes start as, in the accumulation dtype; without an adapter those of W0.

    Those of a DTensor are reduced over its shards.
    """
    dtype = accumulation_dtype(weight.dtype)
    if hasattr(weight, "placements"):
        squares = weight.detach().to(dtype).square()
        return squares.sum(1).sqrt(), squares.sum(0).sqrt()
    if adapter is None:
        adapter = Adapter(weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0))
    row_norm = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    col_squares = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    for V, norm in _blocks(weight, adapter.lora_B, adapter.lora_A.T, scaling, dtype, row_norm):
        squares = V.square_()
        torch.sum(squares, 1, out=norm).sqrt_()
        col_squares += squares.sum(0)
    return row_norm, _together(col_squares, taps).sqrt()


def norms_and_scales(
    weight: Tensor,
    adapter: Adapter,
    options: Options,
    *,
    taps: int = 1,
    complete: Completion = COMPLETE,
    judge: bool = False,
) -> Scales:
    """Norms and scales of the adapted weight, in float32 (float64 for a float64 weight).

    ``complete`` is for a weight that is a shard of a larger one: the norms are those of the whole. With ``judge`` they
    say whether lines are cancelled.
    """
    if not any(adapter.members):
        return Scales()
    scaling, eps, dtype = options.scaling, options.eps, accumulation_dtype(weight.dtype)
    rows_first = adapter.members.rows_first(options.norm_order)
    V, P, Q = first_second(weight, adapter, rows_first)
    m_first, m_second = adapter.magnitudes(rows_first)
    complete_first, complete_second = complete if rows_first else reversed(complete)
    taps_first, taps_second = (1, taps) if rows_first else (taps, 1)
    first_norm = torch.empty(V.shape[0] // taps_first, dtype=dtype, device=weight.device)
    second_squares = torch.zeros(V.shape[1], dtype=dtype, device=weight.device)
    first_cancels: Tensor | bool = False
    second_cancels: Tensor | bool = False
    if complete_first is not None:  # before the other axis can be scaled, which takes a second sweep
        for V_rows, norm in _blocks(V, P, Q, scaling, dtype, first_norm, taps=taps_first):
            norm.copy_(_together(V_rows.square_().sum(1), taps_first))
        first_cancels = judge and _cancels(first_norm, P, Q, None, scaling, taps_first)
        first_norm = complete_first(first_norm).sqrt().clamp_min(eps)
    if complete_first is None or m_second is not None:
        for V_rows, norm, m in _blocks(V, P, Q, scaling, dtype, first_norm, m_first, taps=taps_first):
            if complete_first is None:
                norm.copy_(_together(V_rows.square().sum(1), taps_first)).sqrt_().clamp_min_(eps)
            if m_second is not None:
                second_squares += V_rows.mul_(_apart(m / norm, taps_first)[:, None]).square_().sum(0)
    first = first_norm, m_first.to(dtype) / first_norm
    if complete_first is None:
        first_cancels = judge and _cancels(first_norm.square(), P, Q, None, scaling, taps_first)
    if m_second is None:
        word = _word(first_norm, first_cancels)
        return Scales(*first, cancelled=word) if rows_first else Scales(None, None, *first, cancelled=word)
    second_squares = _together(second_squares, taps_second)
    second_cancels = judge and _cancels(second_squares, Q, P, _apart(first[1], taps_first), scaling, taps_second)
    word = _word(first_norm, first_cancels, second_cancels)
    if complete_second is not None:
        second_squares = complete_second(second_squares)
    second_norm = second_squares.sqrt().clamp_min(eps)
    second = second_norm, m_second.to(dtype) / second_norm
    return Scales(*first, *second, cancelled=word) if rows_first else Scales(*second, *first, cancelled=word)


def _word(like: Tensor, *cancels: Tensor | bool) -> Tensor:
    """``Scales.cancelled``."""
    word = like.new_zeros(4)
    for place, value in enumerate(cancels):
        if value is not False:  # a number from the host is a copy that a GPU waits for
            word[place] = value
    return word


def _cancels(squares: Tensor, P: Tensor, Q: Tensor, scale: Tensor | None, scaling: float, taps: int) -> Tensor | bool:
    """Whether a line of V is shorter than half of its line of s·P·Qᵀ, with Q times a scale: its line of W0 is not."""
    if squares.numel() == 0:  # a shard of no lines
        return False
    P, Q = P.to(squares.dtype), Q.to(squares.dtype)
    Q = Q if scale is None else Q * scale[:, None]
    update = _together((P @ (Q.T @ Q)).mul_(P).sum(1), taps)
    return torch.sub(squares, update, alpha=scaling * scaling / 4).min() < 0


def times_v(
    t: Tensor,
    weight: Tensor,
    adapter: Adapter,
    scaling: float,
    add_product: Callable[[Tensor, Tensor, Tensor], None],
    *,
    transposed: bool,
) -> Tensor:
    """t·Vᵀ, or t·V for ``transposed``, wide: for lines that the update cancels, of which only V knows.

    ``add_product(out, t, V)`` adds t·V to out.
    """
    dtype = accumulation_dtype(t.dtype)
    out = t.new_zeros(t.shape[0], weight.shape[1 if transposed else 0], dtype=dtype)
    rows_of_v = t.T if transposed else out.T
    for V, part in _blocks(weight, adapter.lora_B, adapter.lora_A.T, scaling, dtype, rows_of_v):
        if transposed:
            add_product(out, part.T, V)
        else:
            add_product(part.T, t, V.T)
    return out


@torch.no_grad()
def effective_weight(
    weight: Tensor,
    adapter: Adapter,
    options: Options,
    *,
    taps: int = 1,
    complete: Completion = COMPLETE,
    offset: tuple[int, int] = (0, 0),
) -> Tensor:
    """W' = diag(a)·V·diag(g), made in blocks of rows in float32 and rounded once to the weight's dtype.

    ``offset`` is the row and the column of a larger weight where this shard of it starts; see ``round_weight``.
    """
    scales = norms_and_scales(weight, adapter, options, taps=taps, complete=complete)
    merged, dtype, start = torch.empty_like(weight), accumulation_dtype(weight.dtype), 0
    for V, out in _blocks(weight, adapter.lora_B, adapter.lora_A.T, options.scaling, dtype, merged):
        if scales.row_scale is not None:
            V.mul_(scales.row_scale[start : start + V.shape[0], None])
        if scales.col_scale is not None:
            V.mul_(_apart(scales.col_scale, taps))
        out.copy_(round_weight(V, weight.dtype, (offset[0] + start, offset[1])))
        start += V.shape[0]
    return merged


@torch.no_grad()
def change(weight: Tensor, adapter: Adapter, options: Options, *, taps: int = 1) -> Tensor:
    """W' − W0 in float64, where small changes do not cancel; in float32 on devices that have no float64."""
    wide = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
    return effective_weight(wide, adapter, options, taps=taps).sub_(wide)


def norm_paths(
    weight: Tensor,
    adapter: Adapter,
    scales: Scales,
    dm_row: Tensor | None,
    dm_col: Tensor | None,
    options: Options,
    *,
    taps: int = 1,
    complete_first: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Equations (8) to (11): the magnitudes' gradients, and what the norms add to dA and dB.

    ``dm_row`` = S / m_r and ``dm_col`` = D / m_c come in as they are with detached norms. With a scale m / norm the
    coefficients −S / norm² are −dm·scale / norm, which is 0 for a zero magnitude, as it has to be.

    For a shard of a weight the gradient of the second axis must be complete; that of the first is completed here.
    """
    rows_first = scales.members.rows_first(options.norm_order)
    row, col = (scales.row_norm, scales.row_scale, dm_row), (scales.col_norm, scales.col_scale, dm_col)
    first, second = (row, col) if rows_first else (col, row)
    first_norm, first_scale, dm_first = map(given, first)
    *_, dm_second = second
    taps_first, taps_second = (1, taps) if rows_first else (taps, 1)
    W, P, Q = first_second(weight, adapter, rows_first)
    scaling, eps, acc = options.scaling, options.eps, first_norm.dtype
    P, Q, dm_first = P.to(acc), Q.to(acc), dm_first.clone()
    kappa = None
    if dm_second is not None:
        second_norm, second_scale, _ = map(given, second)
        kappa = torch.where(second_norm > eps, -dm_second * (second_scale / second_norm), 0.0)
        kappa = _apart(kappa, taps_second)
    ratio = first_scale / first_norm
    if complete_first is not None:
        if kappa is not None:
            for V, factor, dm in _blocks(W, P, Q, scaling, acc, ratio, dm_first, taps=taps_first):
                dm.addcmul_(factor, _together(V.square_() @ kappa, taps_first))  # (8)
        dm_first = complete_first(dm_first)
    # V = first_norm⊙U and first_scale⊙V = m⊙U make the two terms of (10) and (11) one: U⊙(m⊗κ − dm_first).
    m = first_scale * first_norm
    dP, dQ_t = torch.empty_like(P), P.new_zeros(P.shape[1], Q.shape[0])
    scale = _apart(first_scale, taps_first)[:, None]
    for V, norm, m_rows, dm, P_rows, out in _blocks(
        W, P, Q, scaling, acc, first_norm, m, dm_first, scale * P, dP, taps=taps_first
    ):
        U = V.mul_(_apart(1 / norm, taps_first)[:, None])
        if complete_first is None and kappa is not None:
            dm.addcmul_(m_rows, _together(U.square() @ kappa, taps_first))  # (8)
        minus_dm = _apart(torch.where(norm > eps, -dm, 0.0), taps_first)[:, None]  # (9)
        dH = U.mul_(minus_dm if kappa is None else (_apart(m_rows, taps_first)[:, None] * kappa).add_(minus_dm))
        torch.mm(dH, Q, out=out)  # (10)
        dQ_t.addmm_(P_rows.T, dH)  # (11)
    dP, dQ_t = scaling * scale * dP, scaling * dQ_t
    if rows_first:
        return dm_first, dm_second, dQ_t, dP
    return dm_second, dm_first, dP.T, dQ_t.T


def first_second(weight: Tensor, adapter: Adapter, rows_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """W [first, second] and the factors P [first, R], Q [second, R]: views only."""
    A, B = adapter.lora_A, adapter.lora_B
    return (weight, B, A.T) if rows_first else (weight.T, A.T, B)


def _together(values: Tensor, taps: int) -> Tensor:
    """The sums over the taps of each column: [K·taps] -> [K]."""
    return values if taps == 1 else values.view(-1, taps).sum(1)


def _apart(values: Tensor, taps: int) -> Tensor:
    """Each column's value for all its taps: [K] -> [K·taps]."""
    return values if taps == 1 else values.repeat_interleave(taps)


def _blocks(
    W: Tensor, P: Tensor, Q: Tensor, scaling: float, dtype: torch.dtype, *others: Tensor, taps: int = 1
) -> Iterator[tuple[Tensor, ...]]:
    """V = W + s·P·Qᵀ in blocks of whole columns' rows, each with its part of the other tensors (by rows or columns).

    All blocks share one buffer, because fresh pages cost a CPU more than the passes.
    """
    Q_t, columns = Q.to(dtype).T, max(1, block_rows(W) // taps)
    rows = columns * taps
    buffer = torch.empty(min(rows, W.shape[0]), W.shape[1], dtype=dtype, device=W.device)
    parts = (t.split(rows if len(t) == len(W) else columns) for t in (W, P.to(dtype), *others))
    for W_rows, P_rows, *rest in zip(*parts, strict=True):
        yield torch.addmm(W_rows.to(dtype), P_rows, Q_t, alpha=scaling, out=buffer[: len(W_rows)]), *rest


def block_rows(matrix: Tensor) -> int:
    elements = _CACHED_ELEMENTS if matrix.device.type == "cpu" else CHUNK_ELEMENTS
    return max(1, elements // max(1, matrix.shape[1]))
