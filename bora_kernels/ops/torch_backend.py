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

Where the update cancels lines of W0, the two terms of (2) and of (4) are nearly opposite. Half-precision products then
take both from the same rounded operand, and the low-rank one in three terms; others are made of V (``_takes_v``).

Source: BoRA, arXiv 2412.06441, section 3; the detached convention is DoRA, arXiv 2402.09353, section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import (
    CHUNK_ELEMENTS,
    Adapter,
    Needs,
    Options,
    Scales,
    accumulation_dtype,
    flatten_scales,
    given,
    separate_product,
    split_scales,
    zero_stand_in,
)
from ..rounding import HALF_PRECISION, fold
from .adapted_weight import block_rows, norm_paths, norms_and_scales, times_v

_wide_product = torch.mm


def forward(
    x: Tensor,
    weight: Tensor,
    adapter: Adapter,
    flat_scales: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    options: Options,
    *,
    products: bool,
    save_product: bool,
    prepared: object = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Equations (1) and (2): the output [M, N], the product before the bias where it is kept apart, u [M, R], scales.

    The scales are one flat tensor (``contract.split_scales``), made here unless they are given; then the returned ones
    are None. ``mask`` [M, K] says what dropout keeps. This backend has no use for ``products`` and ``prepared``.
    """
    made, R = None, adapter.lora_A.shape[0]
    if flat_scales is None and any(adapter.members):
        judge = _has_wide_products(x) if x.dtype in HALF_PRECISION else _reads_word(x)
        flat_scales = made = flatten_scales(norms_and_scales(weight, adapter, options, judge=judge), weight.shape, R)
    scales, dropout_p = split_scales(flat_scales, weight.shape, R, adapter.members), options.dropout_p
    u = _project(_dropped(x, mask, dropout_p), adapter.lora_A, scales.col_scale, options.scaling)  # (1)
    product = _times_adapted(x, u, weight, adapter, scales, mask, options, transposed=False)  # (2)
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
    adapter: Adapter,
    flat_scales: Tensor | None,
    product: Tensor | None,
    u: Tensor | None,
    mask: Tensor | None,
    options: Options,
    needs: Needs,
    *,
    prepared: object = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations (3) to (11): the gradients of x, lora_A, lora_B, magnitude_row and magnitude_col.

    Those of the parameters are in the accumulation dtype.
    """
    lora_A, lora_B, magnitude_row, magnitude_col = adapter
    paths = needs.norm_paths(adapter.members, options)
    needs_S, needs_D = needs.sums(adapter.members, paths)
    scales, dropout_p = split_scales(flat_scales, weight.shape, lora_A.shape[0], adapter.members), options.dropout_p
    stand_in = zero_stand_in(dy.dtype)
    v = _project(dy, lora_B.T, scales.row_scale, options.scaling)  # (3)

    dx = D = None
    if needs.x or needs_D:
        inner = _times_adapted(dy, v, weight, adapter, scales, mask, options, transposed=True)
        live = _live(scales.col_scale, stand_in)
        if needs_D:
            D = _times(_token_sums(inner, given(x)), live)  # (5)
        dx = _times_(inner, scales.col_scale if separate_product(dy.dtype, None) else live).to(dy.dtype)  # (4)
    S = _token_sums(dy, given(product)) if needs_S else None  # (5)

    dA = dB = None
    if needs.lora_B:
        dB = _times(_token_product(given(u), dy), scales.row_scale).T  # (6)
    if needs.lora_A:
        dA = _times(_token_product(v, _dropped(given(x), mask, dropout_p)), scales.col_scale)  # (6)

    dm_row = _magnitude_gradient(S, magnitude_row, scales.row_norm, scales.row_scale, stand_in=stand_in)  # (7)
    dm_col = _magnitude_gradient(D, magnitude_col, scales.col_norm, scales.col_scale, stand_in=stand_in)  # (7)
    if paths:
        dm_row, dm_col, dA_norm, dB_norm = norm_paths(weight, adapter, scales, dm_row, dm_col, options)
        dA = None if dA is None else dA + dA_norm
        dB = None if dB is None else dB_norm + dB

    return (
        dx if needs.x else None,
        None if dA is None else dA.contiguous(),
        None if dB is None else dB.contiguous(),
        dm_row if needs.magnitude_row else None,
        dm_col if needs.magnitude_col else None,
    )


def _times_adapted(
    t: Tensor,
    projection: Tensor,
    weight: Tensor,
    adapter: Adapter,
    scales: Scales,
    mask: Tensor | None,
    options: Options,
    *,
    transposed: bool,
) -> Tensor:
    """(t⊙scale)·Vᵀ of (2), or (t⊙scale)·V of (4) for ``transposed``, with dropout in the low-rank term; wide."""
    lora_A, lora_B, scaling = adapter.lora_A, adapter.lora_B, options.scaling
    scale, matrix = (scales.row_scale, weight) if transposed else (scales.col_scale, weight.T)
    inner, outer = (lora_B, lora_A) if transposed else (lora_A.T, lora_B.T)
    operand = folded(t, scale)
    if _takes_v(t, weight, scales, mask):
        return times_v(operand, weight, adapter, scaling, _add_split_matmul, transposed=transposed)
    product = wide_matmul(operand, matrix)
    dropped = mask if transposed else None
    if t.dtype in HALF_PRECISION and _has_wide_products(t):
        if mask is None and scale is not None:
            rounded = scaling * split_matmul(operand, inner)  # of the operand that W0 meets
            projection = torch.where(given(scales.cancelled).any(), rounded, projection)
        (high, low), (factor_high, factor_low) = _split(projection, t.dtype), _split(outer, t.dtype)
        projection, outer = torch.cat((high, high, low), 1), torch.cat((factor_high, factor_low, factor_high))
    elif dropped is None:
        return product.addmm_(projection, outer.to(product.dtype))
    return product.add_(_dropped(wide_matmul(projection, outer), dropped, options.dropout_p))


def _takes_v(t: Tensor, weight: Tensor, scales: Scales, mask: Tensor | None) -> bool:
    """Whether products are made of V: where lines are cancelled, or could be and nobody knows.

    A CPU's word of cancelled lines can be read, and its half precision is multiplied in float32, which has digits to
    spare. To read a GPU's word would wait for the device, and no CUDA graph could be captured: there V is always made,
    in blocks, which takes R / M of the product's arithmetic and two passes over W0. Dropout prevents cancelling.
    """
    if mask is not None or scales.cancelled is None:
        return False
    if t.dtype in HALF_PRECISION:  # a wider weight, as autocast meets, is not to be rounded by itself
        return _has_wide_products(t) and weight.dtype != t.dtype
    return not _reads_word(t) or any(scales.cancelled.tolist())


def _reads_word(t: Tensor) -> bool:
    """Whether ``Scales.cancelled`` can be read without waiting for the tensor's device."""
    return t.device.type == "cpu"


def _token_sums(s: Tensor, t: Tensor) -> Tensor:
    """Σ_m s⊙t [C] in the accumulation dtype."""
    acc, step = accumulation_dtype(s.dtype), block_rows(s)
    sums = s.new_zeros(s.shape[1], dtype=acc)
    for start in range(0, s.shape[0], step):
        sums += (s[start : start + step].to(acc) * t[start : start + step]).sum(0)
    return sums


def _magnitude_gradient(sums: Tensor | None, *axis: Tensor | None, stand_in: float) -> Tensor | None:
    """S or D over the magnitude that it was made with: that of the stand-in where the scale is zero."""
    if sums is None:
        return None
    magnitude, norm, scale = map(given, axis)
    return sums / torch.where(scale == 0, stand_in * norm, magnitude.to(norm.dtype))


def _live(scale: Tensor | None, stand_in: float) -> Tensor | None:
    """The scale with ``stand_in`` where it is zero."""
    return None if scale is None else torch.where(scale == 0, stand_in, scale)


def _times(t: Tensor, scale: Tensor | None) -> Tensor:
    """t⊙scale over the last dimension."""
    return t if scale is None else t * scale


def _times_(t: Tensor, scale: Tensor | None) -> Tensor:
    """``_times`` in place."""
    return t if scale is None else t.mul_(scale)


def _dropped(t: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    return t if mask is None else torch.where(mask, t / (1.0 - dropout_p), 0.0)


def _project(t: Tensor, factor: Tensor, scale: Tensor | None, scaling: float) -> Tensor:
    """s·(t⊙scale)·factorᵀ for t [M, C] and factor [R, C], accumulated in float32."""
    acc = accumulation_dtype(t.dtype)
    factor = factor.to(acc)
    return scaling * split_matmul(t, (factor if scale is None else factor * scale).T)


def folded(t: Tensor, scale: Tensor | None) -> Tensor:
    """t⊙scale as an operand: rounded with dither where the device has half-precision products, else wide.

    Where an update cancels W0, a rounded operand leaves an error of W0's own product, many times that of what is left.
    """
    if scale is None or t.dtype not in HALF_PRECISION or _has_wide_products(t):
        return fold(t, scale)
    return t.to(accumulation_dtype(t.dtype)) * scale


def _token_product(projection: Tensor, t: Tensor) -> Tensor:
    """projectionᵀ·t [R, C] for t [M, C], wide; a half-precision product takes the projection in two terms."""
    if t.dtype not in HALF_PRECISION or not _has_wide_products(t):
        return wide_matmul(projection.T, t)
    both = wide_matmul(torch.cat(_split(projection, t.dtype), 1).T, t)  # in one read of t
    return both[: projection.shape[1]] + both[projection.shape[1] :]


def split_matmul(t: Tensor, f: Tensor) -> Tensor:
    """t·f in the accumulation dtype, with f wide or as two half-precision terms, so that no small update is lost."""
    acc = accumulation_dtype(t.dtype)
    if t.dtype not in HALF_PRECISION:
        return t @ f.to(acc)
    if not _has_wide_products(t):
        return wide_matmul(t, f)
    high, low = _split(f, t.dtype)
    return wide_matmul(t, high) + wide_matmul(t, low)


def _split(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """t as two half-precision terms: what rounding makes of it, and what it leaves."""
    high = t.to(dtype)
    return high, (t.to(accumulation_dtype(dtype)) - high).to(dtype)


def _add_split_matmul(out: Tensor, t: Tensor, f: Tensor) -> None:
    """out += t·f, as ``split_matmul`` makes it."""
    if t.dtype in HALF_PRECISION:
        out += split_matmul(t, f)
    else:
        out.addmm_(t, f.to(t.dtype))


def _has_wide_products(t: Tensor) -> bool:
    return t.is_cuda and "dtype" in torch.ops.aten.mm.overloads()


def wide_matmul(t: Tensor, matrix: Tensor) -> Tensor:
    """t [M, C] · matrix [C, O] in the accumulation dtype: rounded to half precision it would lose small updates.

    CUDA has half-precision products with a float32 result. Elsewhere the matrix is widened in blocks of rows.
    """
    acc = accumulation_dtype(t.dtype)
    if t.dtype not in HALF_PRECISION and (matrix.dtype not in HALF_PRECISION or t.is_cuda):
        return t @ matrix.to(acc)
    if _has_wide_products(t):
        return _wide_product(t, matrix.to(t.dtype), out_dtype=acc)
    out = t.new_zeros(t.shape[0], matrix.shape[1], dtype=acc)
    step = max(1, CHUNK_ELEMENTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, start + step)
        out.addmm_(t[:, rows].to(acc), matrix[rows].to(acc))
    return out
