"""The door of the package: adapted linear layers, embeddings and convolutions as functions of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import quantized
from .contract import Adapter, Backend, NormOrder, Options, accumulation_dtype
from .ops import autograd, transforms, validation
from .ops.axis_scales import axis_scales
from .ops.convolution import adapted_convolution

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement


def bora_linear(
    x: Tensor,
    weight: Tensor | quantized.Quantized,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    bias: Tensor | None = None,
    *,
    scaling: float,
    norm_order: NormOrder = "row_col",
    detach_norm: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
    eps: float = 1e-12,
    backend: Backend | None = None,
    placements: tuple[Placement, Placement] | None = None,
) -> Tensor:
    """A linear layer whose frozen weight is adapted by BoRA, DoRA or LoRA.

        V  = weight + scaling·lora_B·lora_A
        W' = diag(magnitude_row / ‖·‖_row)·V·diag(magnitude_col / ‖·‖_col)        y = x·W'ᵀ + bias

    A row of the weight is an output feature, a column an input feature. ``norm_order="row_col"`` takes the row norms
    of V and then the column norms of the rows so scaled; ``"col_row"`` the other way around. ``magnitude_col=None``
    is DoRA as PEFT computes it, ``magnitude_row=None`` the same for columns, both None is LoRA.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64. Over a sharded weight (``distributed.sharded``) a DTensor,
            as all tensors and the result are, or this rank's part of one (``placements``). A nested tensor with layout
            ``torch.jagged`` is taken row by row.
        weight: [N, K], frozen, x's dtype (any of these dtypes under ``torch.autocast``); or what
            ``quantized.read(linear)`` makes of a quantized layer, which is dense in x's dtype only while it is used.
        lora_A: [R, K], any floating dtype; float32 keeps small updates.
        lora_B: [N, R].
        magnitude_row: [N] or None.
        magnitude_col: [K] or None.
        bias: [N] or None.
        scaling: s, usually alpha / r.
        norm_order: "row_col" or "col_row".
        detach_norm: treat the norms as constants in backward (DoRA, section 4.3) instead of the exact gradient.
        dropout_p: dropout probability on the input of the low-rank branch; acts only when ``training``.
        training: whether dropout is active.
        eps: norms are clamped from below at eps, as in ``torch.nn.functional.normalize``.
        backend: "triton", "torch", "reference", or None to pick by device.
        placements: over a sharded weight, of a plain x and of the plain y that is made of it.

    Returns:
        y: [..., N] in x's dtype (the autocast dtype under ``torch.autocast``).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative through the "triton" and "torch" backends; "reference" has them.

    Source: BoRA, arXiv 2412.06441, section 3.
    """
    if not training and 0.0 <= dropout_p < 1.0:  # any other is refused with the rest
        dropout_p = 0.0
    options = Options(_constant(scaling), norm_order, detach_norm, dropout_p, eps, backend)
    adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
    if isinstance(x, Tensor) and x.is_nested:
        return transforms.over_nested(x, lambda rows: autograd.adapted_linear(rows, weight, adapter, bias, options))
    if type(weight) not in (Tensor, torch.nn.Parameter) and hasattr(weight, "device_mesh"):
        from .ops.sharded.linear import bora_linear_sharded  # torch.distributed is imported only when it is used

        validation.check_options(options)
        return bora_linear_sharded(x, weight, adapter, bias, options, placements)  # type: ignore[arg-type] # a DTensor
    return autograd.adapted_linear(x, weight, adapter, bias, options)


def _constant(scaling: float) -> float:
    """A scaling as a number. One that is trained would get no gradient, or half of one."""
    if isinstance(scaling, Tensor) and scaling.requires_grad:
        raise TypeError("scaling must be a number, got a tensor that requires a gradient: there is none for it")
    return float(scaling)


def bora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    *,
    scaling: float,
    norm_order: NormOrder = "row_col",
    detach_norm: bool = False,
    eps: float = 1e-12,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of an adapted embedding: y = W'[:, ids]ᵀ = a⊙(weight[ids] + s·lora_A[:, ids]ᵀ·lora_Bᵀ)⊙g[ids].

    Shapes: ids [...] of integers, weight [K, N] as ``torch.nn.Embedding`` keeps it (K tokens, N dimensions),
    lora_A [R, K], lora_B [N, R], magnitude_row [N] or None, magnitude_col [K] or None -> y [..., N] in weight's dtype.
    lora_A gets no gradient at padding_idx.
    """
    with transforms.without_autocast(ids.device):
        adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
        row_scale, col_scale, _ = axis_scales(
            weight.T, adapter, Options(_constant(scaling), norm_order, detach_norm, eps=eps)
        )
        acc = accumulation_dtype(weight.dtype)
        low_rank = F.embedding(ids, lora_A.T, padding_idx=padding_idx).to(acc) @ lora_B.T.to(acc)
        y = F.embedding(ids, weight).to(acc) + scaling * low_rank
        if row_scale is not None:
            y = y * row_scale
        if col_scale is not None:
            y = y * F.embedding(ids, col_scale[:, None])
        return y.to(weight.dtype)


def bora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    bias: Tensor | None,
    convolve: Callable[[Tensor, Tensor], Tensor],
    *,
    scaling: float,
    norm_order: NormOrder = "row_col",
    detach_norm: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """An adapted convolution: y = a⊙[conv(x⊙g, weight) + s·lora_B·conv(drop(x)⊙g, lora_A)] + bias.

    A column is an input channel with all the taps of its kernel, so that g scales x.

    Shapes: x [M, K, *space] or [K, *space], weight [N, K, *kernel], lora_A [R, K, *kernel], lora_B [N, R],
    magnitude_row [N] or None, magnitude_col [K] or None, bias [N] or None -> y [M, N, *space] in x's dtype.
    convolve(x, weight) is the layer's convolution without its bias; it has one group.
    In half precision x⊙(g − 1) is convolved beside x, because rounding x⊙g would lose every g within half an ulp of 1.
    Where the update cancels channels of the weight the two are one convolution with V: ``ops.convolution``.
    """
    x = x.to(validation.autocast_dtype(x) or x.dtype)
    if not training and 0.0 <= dropout_p < 1.0:  # any other is refused
        dropout_p = 0.0
    with transforms.without_autocast(x.device):
        adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
        options = Options(_constant(scaling), norm_order, detach_norm, dropout_p, eps)
        return adapted_convolution(x, weight, adapter, bias, convolve, options)
