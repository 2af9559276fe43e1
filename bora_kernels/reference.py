"""The specification: BoRA, DoRA and LoRA as dense, plain, differentiable PyTorch.

Every other backend is judged against this file, so it shares no code with them and prefers clarity to speed.
A *row* of the weight is an output feature, a *column* an input feature.

    V = weight + scaling · lora_B · lora_A
    row_col:  row_norm = ‖V‖_row                     col_norm = ‖row_scale ⊙ V‖_col
    col_row:  col_norm = ‖V‖_col                     row_norm = ‖V ⊙ col_scale‖_row
    row_scale = magnitude_row / row_norm             col_scale = magnitude_col / col_norm
    W' = diag(row_scale) · V · diag(col_scale)       y = x · W'ᵀ + bias

Without magnitude_col it is DoRA (col_scale = 1), without magnitude_row the same for columns (row_scale = 1), without
both LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

NormOrder = Literal["row_col", "col_row"]
NORM_ORDERS: tuple[NormOrder, ...] = get_args(NormOrder)


def bora_weight_ref(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None = None,
    magnitude_col: Tensor | None = None,
    *,
    scaling: float,
    norm_order: NormOrder = "row_col",
    detach_norm: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """Effective weight of a BoRA, DoRA or LoRA layer.

    W' = diag(row_scale) · (weight + scaling · lora_B · lora_A) · diag(col_scale), see the head of this file.

    Shapes: weight [N, K], lora_A [R, K], lora_B [N, R], magnitude_row [N], magnitude_col [K] -> W' [N, K].
    Dtypes: all is computed and returned in the promoted dtype of the tensors given.
    Norms are clamped from below by eps (or the dtype's smallest normal) as in `F.normalize`: a zero row
    or column stays zero, with gradients of the size of magnitude / eps, finite where the dtype holds that.
    `detach_norm=True` treats both norms as constants in backward.

    Raises ValueError for an unknown norm_order or an unfit shape.

    Source: BoRA, arXiv 2412.06441, section 3; detached norms: DoRA, arXiv 2402.09353, section 4.3.
    """
    effective, *_ = _effective_weight(
        weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling, norm_order, detach_norm, eps
    )
    return effective


def bora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None = None,
    magnitude_col: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float,
    norm_order: NormOrder = "row_col",
    detach_norm: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
    eps: float = 1e-12,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Linear layer with a BoRA, DoRA or LoRA adapter.

    y = x · W'ᵀ + bias, with W' of `bora_weight_ref`. Dropout acts on the input of the low-rank branch only:

        y = x · (diag(row_scale) · weight · diag(col_scale))ᵀ + bias
            + drop(x) · (diag(row_scale) · scaling · lora_B · lora_A · diag(col_scale))ᵀ
        drop(x) = x ⊙ dropout_mask / (1 - dropout_p); the norms ignore it

    A given dropout_mask always applies. Without one, a mask is drawn if training is set and dropout_p > 0.

    Shapes: x [..., K], bias [N], dropout_mask as x, the rest as in `bora_weight_ref` -> y [..., N].
    Dtypes: dropout_mask is bool, True where x is kept. W' (under dropout, each of its two terms) is computed
    in the promoted dtype of weight, factors and magnitudes and rounded once to x.dtype; y is in x.dtype.

    Raises ValueError as `bora_weight_ref` does, for dropout_p outside [0, 1) and for a mask that is not bool.

    Source: BoRA, arXiv 2412.06441, section 3; detached norms: DoRA, arXiv 2402.09353, section 4.3.
    """
    effective, update, row_scale, col_scale = _effective_weight(
        weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling, norm_order, detach_norm, eps
    )
    out_features, in_features = weight.shape
    _check_shape("x", x, (*x.shape[:-1], in_features))
    _check_shape("bias", bias, (out_features,))
    _check_shape("dropout_mask", dropout_mask, tuple(x.shape))
    if dropout_mask is not None and dropout_mask.dtype != torch.bool:
        raise ValueError(f"dropout_mask must be torch.bool, got {dropout_mask.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")

    bias = None if bias is None else bias.to(x.dtype)
    if dropout_mask is None and training and dropout_p > 0.0:
        dropout_mask = torch.rand_like(x, dtype=torch.float32) >= dropout_p
    if dropout_mask is None:
        return F.linear(x, effective.to(x.dtype), bias)
    dropped_x = x * dropout_mask / (1.0 - dropout_p)
    y = F.linear(x, (row_scale * weight * col_scale).to(x.dtype), bias)
    return y + F.linear(dropped_x, (row_scale * update * col_scale).to(x.dtype))


def bora_linear_mixed_ref(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Mapping[str, Any] | None],
    index: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear layer with an adapter for each token: y[t] is that of `bora_linear_ref` with adapters[index[t]].

    Shapes: x [..., K], index [...] of integers, bias [N] -> y [..., N]. An adapter is the keyword arguments of
    `bora_linear_ref` (lora_A, lora_B, magnitudes, scaling, norm_order), or None for the base layer alone.

    Raises ValueError as `bora_linear_ref` does, and for an index of another shape than x or out of range.
    """
    _check_shape("index", index, tuple(x.shape[:-1]))
    y = x.new_zeros(*x.shape[:-1], weight.shape[0])
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < len(adapters)):
        raise ValueError(f"index must be in [0, {len(adapters)}), got {int(index.min())} to {int(index.max())}")
    for number, adapter in enumerate(adapters):
        mine = index == number
        if adapter is None:
            y[mine] = F.linear(x[mine], weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        else:
            y[mine] = bora_linear_ref(x[mine], weight, bias=bias, **adapter)
    return y


def _effective_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    scaling: float,
    norm_order: NormOrder,
    detach_norm: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W' [N, K], scaling·B·A [N, K], row_scale [N, 1], col_scale [1, K]; an absent scale is 1."""
    if norm_order not in NORM_ORDERS:
        raise ValueError(f"norm_order must be one of {NORM_ORDERS}, got {norm_order!r}")
    for name, matrix in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {list(matrix.shape)}")
    (out_features, in_features), rank = weight.shape, lora_A.shape[0]
    _check_shape("lora_A", lora_A, (rank, in_features))
    _check_shape("lora_B", lora_B, (out_features, rank))
    _check_shape("magnitude_row", magnitude_row, (out_features,))
    _check_shape("magnitude_col", magnitude_col, (in_features,))

    given = [t for t in (weight, lora_A, lora_B, magnitude_row, magnitude_col) if t is not None]
    dtype = reduce(torch.promote_types, (t.dtype for t in given))
    update = scaling * (lora_B.to(dtype) @ lora_A.to(dtype))
    effective = weight.to(dtype) + update  # V, then H, then W'
    row_scale = col_scale = effective.new_ones(())
    for axis in norm_order.split("_"):
        if axis == "row" and magnitude_row is not None:
            row_scale = magnitude_row.to(dtype)[:, None] / _clamped_norm(effective, 1, detach_norm, eps)
            effective = row_scale * effective
        if axis == "col" and magnitude_col is not None:
            col_scale = magnitude_col.to(dtype)[None, :] / _clamped_norm(effective, 0, detach_norm, eps)
            effective = effective * col_scale
    return effective, update, row_scale, col_scale


def _clamped_norm(matrix: Tensor, dim: int, detach: bool, eps: float) -> Tensor:
    """max(‖matrix‖ along dim, eps), kept as a dimension of size 1.

    A clamped line is replaced before its norm is taken: the norm's second derivative is NaN at zero, and no
    clamp after it can undo that.
    """
    eps = max(eps, torch.finfo(matrix.dtype).tiny)  # 1e-12 is 0 in float16
    clamped = torch.linalg.vector_norm(matrix.detach(), dim=dim, keepdim=True) < eps
    norm = torch.linalg.vector_norm(matrix.masked_fill(clamped, 1.0), dim=dim, keepdim=True)
    norm = norm.masked_fill(clamped, eps)
    return norm.detach() if detach else norm


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
