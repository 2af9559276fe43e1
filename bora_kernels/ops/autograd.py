"""``BoraLinearFunction``, the custom backward, and ``adapted_linear``, the layer on one device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import quantized, reference
from ..contract import Needs, separate_product
from . import operators, reuse, validation


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
    """y = x·W'ᵀ + bias on operators whose backward is closed form; see ``torch_backend`` for the equations.

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
        gradients = operators.backward(
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
    y, product, u, made = operators.forward(
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


def adapted_linear(
    x: Tensor, parameters: tuple, *, scaling: float, norm_order: str, detach_norm: bool, dropout_p: float, eps: float,
    backend: str | None,
) -> Tensor:  # fmt: skip
    """``bora_linear`` on one device: checks the tensors, chooses the backend and runs it.

    ``parameters``: weight, lora_A, lora_B, magnitude_row, magnitude_col, bias. ``dropout_p`` is 0 outside of training.
    """
    x, backend, prepared = validation.prepare(x, parameters, backend)
    weight, layout, parts = parameters[0], None, ()
    if isinstance(weight, quantized.Quantized):
        (layout, parts), weight = weight, weight.dense(x.dtype) if backend == "reference" else None
    if backend == "reference":
        return reference.bora_linear_ref(
            x, weight, *parameters[1:], scaling=scaling, norm_order=norm_order, detach_norm=detach_norm,
            dropout_p=dropout_p, training=True, eps=eps,
        )  # fmt: skip
    dropout = operators.draw_dropout(x, dropout_p, backend) if dropout_p > 0.0 else None
    call = Call(float(scaling), norm_order, detach_norm, dropout_p, eps, backend, prepared, layout)
    if not torch.is_grad_enabled():
        return _forward(_NO_NEEDS, x, weight, *parameters[1:], dropout, call, parts)[0]
    return BoraLinearFunction.apply(x, weight, *parameters[1:], dropout, call, *parts)
