"""``BoraLinearFunction``, the custom backward, and ``bora_linear``, the function that everything else calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, quantized, reference, reuse, validation
from .plan import Needs, separate_product


class Call(NamedTuple):
    """What a call computes with besides tensors."""

    scaling: float
    norm_order: str
    detach_norm: bool
    dropout_p: float
    eps: float
    backend: str
    prepared: validation.Prepared | None = None
    layout: quantized.Layout | None = None  # of a quantized weight


class BoraLinearFunction(torch.autograd.Function):
    """y = x·W'ᵀ + bias on operators whose backward is closed form; see ``factored`` for the equations.

    Saved for backward: x, the product before the bias (y itself where there is none), u = s·x·(A⊙g)ᵀ, the factors,
    and the norms and scales. Nothing of the weight's size is saved, and no gradient of that size is ever made.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # [..., K]
        weight: Tensor | None,  # [N, K]; None for a quantized one
        lora_A: Tensor,  # [R, K]
        lora_B: Tensor,  # [N, R]
        magnitude_row: Tensor | None,  # [N]
        magnitude_col: Tensor | None,  # [K]
        bias: Tensor | None,  # [N]
        dropout: Tensor | None,  # what the backend draws its mask from
        call: Call,
        *parts: Tensor,  # what a quantized weight is stored as
    ) -> Tensor:
        requested = ctx.needs_input_grad
        needs = Needs(requested[0], *requested[2:6])
        y, product, u, scales, needs_S, needs_D = _forward(
            needs, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, bias, dropout, call, parts
        )
        ctx.save_for_backward(
            x if needs.lora_A or needs_D else None,
            lora_A,
            lora_B,
            magnitude_row,
            magnitude_col,
            scales,
            (product if separate_product(x.dtype, bias) else y) if needs_S else None,
            u if needs.lora_B else None,
            dropout,
            *((weight,) if call.layout is None else parts),
        )
        ctx.needs, ctx.call = needs, call
        # what hooks hand back for a saved tensor may lie in memory otherwise
        hooked = call.prepared is not None and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ctx.prepared = None if hooked else call.prepared
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        # grad mode is on for create_graph=True alone, and only then is there a second derivative to refuse
        return (once_differentiable(_backward) if torch.is_grad_enabled() else _backward)(ctx, dy)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dA = dB = dm_row = dm_col = d_bias = None
    call, needs = ctx.call, ctx.needs
    if any(needs):
        x, lora_A, lora_B, magnitude_row, magnitude_col, scales, product, u, dropout, *stored = ctx.saved_tensors
        flat_dy, weight = _flat(dy), stored[0]
        adapter = (lora_A, lora_B, magnitude_row, magnitude_col)
        prepared = validation.prepare_backward(ctx.prepared, flat_dy, (*adapter, *stored))
        if call.layout is not None:
            weight = quantized.dense(call.layout, tuple(stored), dy.dtype, call.backend, "backward")
        gradients = ops.backward(
            flat_dy, _flat(x), weight, *adapter,
            scales, _flat(product), u, dropout, *call[:5], list(needs), call.backend, prepared=prepared,
        )  # fmt: skip
        # an operator's absent gradient is an empty tensor
        dx, dA, dB, dm_row, dm_col = (
            gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
        )
        if dx is not None and dy.ndim != 2:
            dx = dx.view(*dy.shape[:-1], weight.shape[1])
    if ctx.needs_input_grad[6]:
        d_bias = _flat(dy).sum(0)
    others = len(ctx.needs_input_grad) - 7
    return dx, None, dA, dB, dm_row, dm_col, d_bias, *[None] * others


def _forward(
    needs: Needs,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    bias: Tensor | None,
    dropout: Tensor | None,
    call: Call,
    parts: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, bool, bool]:
    """The output, and what a backward with these needs uses again: the product before the bias, u, the scales.

    And whether it needs S and D. A quantized weight (its layout and parts) is dense as long as this call runs.
    """
    scaling, norm_order, detach_norm, dropout_p, eps, backend, prepared, layout = call
    stored = (weight,)
    if layout is not None:
        stored, weight = parts, quantized.dense(layout, parts, x.dtype, backend, "forward")
    has_row, has_col = magnitude_row is not None, magnitude_col is not None
    paths = needs.norm_paths(has_row, has_col, norm_order, detach_norm)
    needs_S, needs_D = needs.sums(has_row, has_col, norm_order, detach_norm)
    adapter = (lora_A, lora_B, magnitude_row, magnitude_col)
    scales = keep = None
    if has_row:
        scales, keep = reuse.find(
            lora_B,
            lambda: reuse.state_of((*stored, *adapter), (scaling, norm_order, eps, backend, weight.dtype)),
            paths,
        )
    y, product, u, made = ops.forward(
        _flat(x), weight, *adapter, scales, bias, dropout,
        scaling, norm_order, dropout_p, eps, paths, needs_S, backend,
        prepared=prepared,
    )  # fmt: skip
    if scales is None and has_row:
        scales = made
        if keep is not None:
            keep(made)
    if x.ndim != 2:  # not as a view, so that the output may be changed in place
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])
    return y, product, u, scales, needs_S, needs_D


def _flat(t: Tensor | None) -> Tensor | None:
    """[..., C] -> [M, C]"""
    return t if t is None or t.ndim == 2 else t.reshape(-1, t.shape[-1])


_NO_NEEDS = Needs(False, False, False, False, False)


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
    norm_order: str = "row_col",
    detach_norm: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """A linear layer whose frozen weight is adapted by BoRA, DoRA or LoRA.

        V  = weight + scaling·lora_B·lora_A
        W' = diag(magnitude_row / ‖·‖_row)·V·diag(magnitude_col / ‖·‖_col)        y = x·W'ᵀ + bias

    A row of the weight is an output feature, a column an input feature. ``norm_order="row_col"`` takes the row norms
    of V and then the column norms of the rows so scaled; ``"col_row"`` the other way around. ``magnitude_col=None``
    is DoRA as PEFT computes it, both magnitudes None is LoRA.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64. Over a sharded weight (``distributed.sharded``) a DTensor,
            as all tensors and the result are.
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

    Returns:
        y: [..., N] in x's dtype (the autocast dtype under ``torch.autocast``).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative through the "triton" and "torch" backends; "reference" has them.

    Source: BoRA, arXiv 2412.06441, section 3.
    """
    validation.check_options(scaling=scaling, norm_order=norm_order, dropout_p=dropout_p, eps=eps)
    parameters = (weight, lora_A, lora_B, magnitude_row, magnitude_col, bias)
    if type(weight) not in (Tensor, torch.nn.Parameter) and hasattr(weight, "device_mesh"):
        from .distributed.sharded import bora_linear_sharded  # torch.distributed is imported only when it is used

        return bora_linear_sharded(
            x, *parameters, scaling=scaling, norm_order=norm_order, detach_norm=detach_norm,
            dropout_p=dropout_p if training else 0.0, eps=eps, backend=backend,
        )  # fmt: skip
    x, backend, prepared = validation.prepare(x, parameters, backend)
    if not training:
        dropout_p = 0.0
    layout, parts = None, ()
    if isinstance(weight, quantized.Quantized):
        (layout, parts), weight = weight, weight.dense(x.dtype) if backend == "reference" else None
    if backend == "reference":
        return reference.bora_linear_ref(
            x, weight, *parameters[1:], scaling=scaling, norm_order=norm_order, detach_norm=detach_norm,
            dropout_p=dropout_p, training=training, eps=eps,
        )  # fmt: skip
    dropout = ops.draw_dropout(x, dropout_p, backend) if dropout_p > 0.0 else None
    call = Call(float(scaling), norm_order, detach_norm, dropout_p, eps, backend, prepared, layout)
    if not torch.is_grad_enabled():
        return _forward(_NO_NEEDS, x, weight, *parameters[1:], dropout, call, parts)[0]
    return BoraLinearFunction.apply(x, weight, *parameters[1:], dropout, call, *parts)
