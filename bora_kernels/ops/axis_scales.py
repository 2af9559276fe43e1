"""BoRA and DoRA for embeddings and convolutions, factored, in PyTorch operations.

Both are linear maps: an embedding is one of one-hot vectors, a convolution one of patches. With a *row* for each
output feature (embedding dimension, output channel) and a *column* for each input feature (token, input channel), the
weight is W0 [N, K, P], where P counts the taps of a convolution's kernel and is 1 otherwise, and

    V  = W0 + s·B·A        a = m_r / ‖·‖_row        g = m_c / ‖·‖_col        W' = a⊙V⊙g

where a row's norm runs over K and P, a column's over N and P. ``axis_scales`` gives a and g and is differentiable in
closed form; everything else is a few operations that autograd differentiates. W' is never made, and no gradient of the
weight's size is kept:

    (1) κ = −dg⊙g/γ²            da += a⊙(V²·κ)          dm_second = dg/γ          (the axis normalized second)
    (2) λ = −da⊙a/ρ²            dm_first = da/ρ                                   (the axis normalized first)
    (3) dV = (a²·κᵀ + λ)⊙V      dB = s·dV·Aᵀ            dA = s·Bᵀ·dV              (in blocks)

Source: BoRA, arXiv 2412.06441, section 3; detached norms: DoRA, arXiv 2402.09353, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..contract import CHUNK_ELEMENTS, accumulation_dtype
from ..rounding import round_weight
from . import validation


def axis_scales(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor,
    magnitude_col: Tensor | None,
    *,
    scaling: float,
    norm_order: str = "row_col",
    detach_norm: bool = False,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor | None]:
    """a [N] and g [K] (None without magnitude_col), differentiable in lora_A, lora_B and the magnitudes.

    Shapes: weight [N, K, P], lora_A [R, K, P], lora_B [N, R], magnitude_row [N], magnitude_col [K] or None. The scales
    are float32 (float64 for a float64 weight). Norms are clamped from below at eps, with no gradient through a clamp.

    Raises ValueError for an unknown norm_order or a weight that requires a gradient.
    """
    validation.check_options(scaling=scaling, norm_order=norm_order, dropout_p=0.0, eps=eps)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen (requires_grad=False): no gradient is computed for it")
    if magnitude_col is None:
        scale = _AxisScales.apply(weight, lora_A, lora_B, magnitude_row, None, scaling, 0, detach_norm, eps)[0]
        return scale, None
    if norm_order == "row_col":
        return _AxisScales.apply(weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling, 0, detach_norm, eps)
    col_scale, row_scale = _AxisScales.apply(
        weight, lora_A, lora_B, magnitude_col, magnitude_row, scaling, 1, detach_norm, eps
    )
    return row_scale, col_scale


@torch.no_grad()
def axis_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """‖V‖_row [N] and ‖V‖_col [K] of V = weight + scaling·lora_B·lora_A: what magnitudes start as.

    Shapes and dtypes as in ``axis_scales``.
    """
    dtype = accumulation_dtype(weight.dtype)
    row_squares = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device)
    col_squares = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    for rows, V in _blocks(weight, lora_A, lora_B, scaling, 0):
        squares = V.square().sum(2)
        row_squares[rows] = squares.sum(1)
        col_squares += squares.sum(0)
    return row_squares.sqrt(), col_squares.sqrt()


@torch.no_grad()
def merged_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor,
    magnitude_col: Tensor | None,
    *,
    scaling: float,
    norm_order: str = "row_col",
    eps: float = 1e-12,
) -> Tensor:
    """W' = a⊙V⊙g [N, K, P], made in blocks in float32 and rounded once to weight's dtype (``round_weight``).

    Shapes as in ``axis_scales``.
    """
    row_scale, col_scale = axis_scales(
        weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling=scaling, norm_order=norm_order, eps=eps
    )
    merged = torch.empty_like(weight)
    for rows, V in _blocks(weight, lora_A, lora_B, scaling, 0):
        V = row_scale[rows, None, None] * V
        V = V if col_scale is None else V * col_scale[:, None]
        merged[rows] = round_weight(V.flatten(1), weight.dtype, (rows.start, 0)).view_as(V)
    return merged


class _AxisScales(torch.autograd.Function):
    """The scales of the axis normalized first and of the other one (a placeholder without its magnitude)."""

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,  # [N, K, P]
        lora_A: Tensor,  # [R, K, P]
        lora_B: Tensor,  # [N, R]
        m_first: Tensor,
        m_second: Tensor | None,
        scaling: float,
        first: int,  # the axis normalized first: 0 for rows, 1 for columns
        detach_norm: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = accumulation_dtype(weight.dtype)
        first_norm = torch.zeros(weight.shape[first], dtype=dtype, device=weight.device)
        second_squares = torch.zeros(weight.shape[1 - first], dtype=dtype, device=weight.device)
        for part, V in _blocks(weight, lora_A, lora_B, scaling, first):
            first_norm[part] = V.square().sum((1, 2)).sqrt().clamp_min(eps)
            if m_second is not None:
                H = (m_first[part] / first_norm[part])[:, None, None] * V
                second_squares += H.square().sum((0, 2))
        first_scale = m_first.to(dtype) / first_norm
        second_norm = second_squares.sqrt().clamp_min(eps)
        second_scale = None if m_second is None else m_second.to(dtype) / second_norm
        ctx.save_for_backward(weight, lora_A, lora_B, first_norm, second_norm, first_scale, second_scale)
        ctx.options = (scaling, first, detach_norm, eps)
        ctx.dtypes = (lora_A.dtype, lora_B.dtype, m_first.dtype, None if m_second is None else m_second.dtype)
        return first_scale, second_scale

    @staticmethod
    @once_differentiable
    def backward(ctx, d_first: Tensor, d_second: Tensor | None):
        weight, lora_A, lora_B, first_norm, second_norm, first_scale, second_scale = ctx.saved_tensors
        scaling, first, detach_norm, eps = ctx.options
        with torch.autocast(weight.device.type, enabled=False):
            dm_second = None if second_scale is None else d_second / second_norm  # (1)
            if detach_norm:
                dA = dB = None
            else:
                d_first, dA, dB = _norm_paths(
                    weight, lora_A, lora_B, d_first, d_second, first_norm, second_norm, first_scale, second_scale,
                    scaling, first, eps,
                )  # fmt: skip
            gradients = (dA, dB, d_first / first_norm, dm_second)  # (2)
        gradients = (None if t is None else t.to(dtype) for t, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, *gradients, None, None, None, None


def _norm_paths(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    d_first: Tensor,
    d_second: Tensor | None,
    first_norm: Tensor,
    second_norm: Tensor,
    first_scale: Tensor,
    second_scale: Tensor | None,
    scaling: float,
    first: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (1) to (3): the whole gradient of the first scale, and what the norms give dA and dB."""
    dtype = first_norm.dtype
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    kappa = None
    if second_scale is not None:
        kappa = torch.where(second_norm > eps, -d_second * second_scale / second_norm.square(), 0.0)  # (1)
        d_first = d_first.clone()
    for part, V in _blocks(weight, lora_A, lora_B, scaling, first):
        scale = first_scale[part]
        if kappa is not None:
            d_first[part] += scale * (V.square().sum(2) @ kappa)  # (1)
        lam = torch.where(first_norm[part] > eps, -d_first[part] * scale / first_norm[part].square(), 0.0)  # (2)
        factor = lam[:, None] if kappa is None else lam[:, None] + scale.square()[:, None] * kappa
        dV = scaling * factor[..., None] * V  # (3)
        if first == 0:
            dB[part] = dV.flatten(1) @ A.flatten(1).T
            dA += (B[part].T @ dV.flatten(1)).view_as(A)
        else:
            dV = dV.transpose(0, 1)
            dB += dV.flatten(1) @ A[:, part].flatten(1).T
            dA[:, part] = (B.T @ dV.flatten(1)).view_as(A[:, part])
    return d_first, dA, dB


def _blocks(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, first: int
) -> Iterator[tuple[slice, Tensor]]:
    """V in blocks along the first axis, which comes to the front: [part, K, P] of rows or [part, N, P] of columns."""
    dtype = accumulation_dtype(weight.dtype)
    A, B = lora_A.to(dtype), scaling * lora_B.to(dtype)
    step = max(1, CHUNK_ELEMENTS * weight.shape[first] // weight.numel())
    for start in range(0, weight.shape[first], step):
        part = slice(start, start + step)
        if first == 0:
            W, update = weight[part], B[part] @ A.flatten(1)
        else:
            W, update = weight[:, part], B @ A[:, part].flatten(1)
        V = W.to(dtype) + update.view(W.shape)
        yield part, V if first == 0 else V.transpose(0, 1)
