"""The layer in closed form with PyTorch operations only: the "torch" backend.

The forward never forms the dense weight W' and the backward never forms a dense gradient. With

    V = W0 + s·B·A        a = m_r / ‖·‖_row        g = m_c / ‖·‖_col        (a row is an output, a column an input)

    (1) u  = s·(drop(x)⊙g)·Aᵀ                 [M, R]
    (2) y  = a⊙[ (x⊙g)·W0ᵀ + u·Bᵀ ] + bias    [M, N]
    (3) v  = s·(dy⊙a)·B                       [M, R]
    (4) dx = g⊙[ (dy⊙a)·W0 + drop'(v·A) ]     [M, K]
    (5) S  = Σ_m dy⊙(y − bias)  [N]           D  = Σ_m dx⊙x  [K]
    (6) dB = a⊙(dyᵀ·u)                        dA = g⊙(vᵀ·drop(x))
    (7) dm_r = S / m_r                        dm_c = D / m_c

The exact gradient adds the paths through the norms. "First" is the axis normalized first (rows for row_col, columns
for col_row). V is then [first, second] with factors P [first, R] and Q [second, R], and both orders are one formula:

    (8)  κ = −S_second / second_norm²         w = V²·κ           S'_first = S_first + first_scale²⊙w
    (9)  λ = −S'_first / first_norm²          dm_first = S'_first / m_first
    (10) dP += s·[ first_scale²⊙(V·(κ⊙Q)) + λ⊙(V·Q) ]
    (11) dQ += s·[ κ⊙(Vᵀ·(first_scale²⊙P)) + Vᵀ·(λ⊙P) ]

Source: BoRA, arXiv 2412.06441, section 3; the detached convention is DoRA, arXiv 2402.09353, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .plan import (
    CHUNK_ELEMENTS,
    COMPLETE,
    Completion,
    Needs,
    Scales,
    accumulation_dtype,
    join_scales,
    separate_product,
    split_scales,
    zero_stand_in,
)
from .rounding import HALF_PRECISION, fold, round_weight

_CACHED_ELEMENTS = 1 << 18  # of a block on a CPU that is passed over several times: it stays in the cache


def norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row norms [N] and column norms [K] of a weight, made in blocks of rows in the accumulation dtype."""
    dtype = accumulation_dtype(weight.dtype)
    row_norm = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    col_squares = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    step = _block_rows(weight)
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


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    *,
    scaling: float,
    norm_order: str,
    dropout_p: float,
    eps: float,
    products: bool,
    save_product: bool,
    prepared: object = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Equations (1) and (2): the output [M, N], the product before the bias where it is kept apart, u [M, R], scales.

    The scales are one flat tensor (``plan.split_scales``), made here unless they are given; then the returned ones are
    None. This backend has no use for ``products`` and ``prepared``.
    """
    made = None
    if scales is None:
        computed = norms_and_scales(
            weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling=scaling, norm_order=norm_order, eps=eps
        )
        if magnitude_row is not None:
            scales = made = join_scales(computed, *weight.shape, lora_A.shape[0])
    scales = split_scales(scales, *weight.shape, lora_A.shape[0], magnitude_col is not None)
    u = _project(_dropped(x, keep, dropout_p), lora_A, scales.col_scale, scaling)  # (1)
    product = _wide_matmul(fold(x, scales.col_scale), weight.T)
    _add_split_matmul(product, u.to(x.dtype), lora_B.T)  # (2)
    live = _live(scales.row_scale, zero_stand_in(x.dtype))
    apart = separate_product(x.dtype, bias)
    kept = _times(product, live).to(x.dtype, copy=True) if apart and save_product else None
    y = _times_(product, scales.row_scale if apart else live)
    if bias is not None:
        y += bias
    return y.to(x.dtype), kept, u, made


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    scales: Tensor | None,
    product: Tensor | None,
    u: Tensor | None,
    keep: Tensor | None,
    *,
    scaling: float,
    norm_order: str,
    detach_norm: bool,
    dropout_p: float,
    eps: float,
    needs: Needs,
    prepared: object = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations (3) to (11): the gradients of x, lora_A, lora_B, magnitude_row and magnitude_col.

    Those of the parameters are in the accumulation dtype.
    """
    members = magnitude_row is not None, magnitude_col is not None
    needs_S, needs_D = needs.sums(*members, norm_order, detach_norm)
    scales = split_scales(scales, *weight.shape, lora_A.shape[0], members[1])
    acc = accumulation_dtype(dy.dtype)
    stand_in = zero_stand_in(dy.dtype)
    v = _project(dy, lora_B.T, scales.row_scale, scaling)  # (3)

    dx = D = None
    if needs.x or needs_D:
        inner = _wide_matmul(fold(dy, scales.row_scale), weight)
        if keep is None:
            _add_split_matmul(inner, v.to(dy.dtype), lora_A)
        else:
            inner += _dropped(_split_matmul(v.to(dy.dtype), lora_A), keep, dropout_p)
        live = _live(scales.col_scale, stand_in)
        if needs_D:
            D = _times(_token_sums(inner, x), live)  # (5)
        dx = _times_(inner, scales.col_scale if separate_product(dy.dtype, None) else live).to(dy.dtype)  # (4)
    S = _token_sums(dy, product) if needs_S else None  # (5)

    dA = dB = None
    if needs.lora_B:
        dB = _times((u.to(dy.dtype).T @ dy).to(acc), scales.row_scale).T  # (6)
    if needs.lora_A:
        dA = _times((v.to(dy.dtype).T @ _dropped(x, keep, dropout_p)).to(acc), scales.col_scale)  # (6)

    if needs.norm_paths(*members, norm_order, detach_norm):
        S, D, dA_norm, dB_norm = norm_paths(weight, lora_A, lora_B, scales, S, D, norm_order, scaling, eps)
        dA = dA + dA_norm if needs.lora_A else None
        dB = dB_norm + dB if needs.lora_B else None
    dm_row = S / live_magnitude(magnitude_row, scales.row_norm, scales.row_scale, stand_in) if needs_S else None  # (7)
    dm_col = D / live_magnitude(magnitude_col, scales.col_norm, scales.col_scale, stand_in) if needs_D else None  # (7)

    return (
        dx if needs.x else None,
        dA.contiguous() if needs.lora_A else None,
        dB.contiguous() if needs.lora_B else None,
        dm_row if needs.magnitude_row else None,
        dm_col if needs.magnitude_col else None,
    )


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
    Q_t, step = Q.to(dtype).T, _block_rows(W)
    buffer = torch.empty(min(step, W.shape[0]), W.shape[1], dtype=dtype, device=W.device)
    for W_rows, P_rows, *rows in zip(*(t.split(step) for t in (W, P.to(dtype), *others)), strict=True):
        yield torch.addmm(W_rows.to(dtype), P_rows, Q_t, alpha=scaling, out=buffer[: len(W_rows)]), *rows


def _block_rows(matrix: Tensor) -> int:
    elements = _CACHED_ELEMENTS if matrix.device.type == "cpu" else CHUNK_ELEMENTS
    return max(1, elements // max(1, matrix.shape[1]))


def _token_sums(s: Tensor, t: Tensor) -> Tensor:
    """Σ_m s⊙t [C] in the accumulation dtype."""
    acc, step = accumulation_dtype(s.dtype), _block_rows(s)
    sums = s.new_zeros(s.shape[1], dtype=acc)
    for start in range(0, s.shape[0], step):
        sums += (s[start : start + step].to(acc) * t[start : start + step]).sum(0)
    return sums


def live_magnitude(magnitude: Tensor, norm: Tensor, scale: Tensor, stand_in: float) -> Tensor:
    """The magnitude that S or D was made with: that of the stand-in where the scale is zero."""
    return torch.where(scale == 0, stand_in * norm, magnitude.to(norm.dtype))


def _live(scale: Tensor | None, stand_in: float) -> Tensor | None:
    """The scale with ``stand_in`` where it is zero."""
    return None if scale is None else torch.where(scale == 0, stand_in, scale)


def _times(t: Tensor, scale: Tensor | None) -> Tensor:
    """t⊙scale over the last dimension."""
    return t if scale is None else t * scale


def _times_(t: Tensor, scale: Tensor | None) -> Tensor:
    """``_times`` in place."""
    return t if scale is None else t.mul_(scale)


def _dropped(t: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    return t if keep is None else torch.where(keep, t / (1.0 - dropout_p), 0.0)


def _project(t: Tensor, factor: Tensor, scale: Tensor | None, scaling: float) -> Tensor:
    """s·(t⊙scale)·factorᵀ for t [M, C] and factor [R, C], accumulated in float32."""
    acc = accumulation_dtype(t.dtype)
    factor = factor.to(acc)
    return scaling * _split_matmul(t, (factor if scale is None else factor * scale).T)


def _split_matmul(t: Tensor, f: Tensor) -> Tensor:
    """t·f in the accumulation dtype, with f as two half-precision terms, so that no small update of f is lost."""
    acc = accumulation_dtype(t.dtype)
    if t.dtype not in HALF_PRECISION:
        return t @ f.to(acc)
    high = f.to(t.dtype)
    low = (f.to(acc) - high.to(acc)).to(t.dtype)
    return _wide_matmul(t, high) + _wide_matmul(t, low)


def _add_split_matmul(out: Tensor, t: Tensor, f: Tensor) -> None:
    """out += t·f, as ``_split_matmul`` makes it."""
    if t.dtype in HALF_PRECISION:
        out += _split_matmul(t, f)
    else:
        out.addmm_(t, f.to(t.dtype))


def _wide_matmul(t: Tensor, matrix: Tensor) -> Tensor:
    """t [M, C] · matrix [C, O] in the accumulation dtype: rounded to half precision it would lose small updates.

    CUDA has half-precision products with a float32 result. Elsewhere the matrix is widened in blocks of rows.
    """
    acc = accumulation_dtype(t.dtype)
    if t.dtype not in HALF_PRECISION:
        return t @ matrix.to(acc)
    if t.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(t, matrix.to(t.dtype), out_dtype=acc)
    out = t.new_zeros(t.shape[0], matrix.shape[1], dtype=acc)
    step = max(1, CHUNK_ELEMENTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, start + step)
        out.addmm_(t[:, rows].to(acc), matrix[rows].to(acc))
    return out
