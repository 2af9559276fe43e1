"""``BoraLinearFunction``, the custom backward, and ``bora_linear``, the function that everything else calls."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, reference
from .plan import Needs, Scales, separate_product


class BoraLinearFunction(torch.autograd.Function):
    """y = x·W'ᵀ + bias on operators whose backward is closed form; see ``factored`` for the equations.

    Saved for backward: x, the product before the bias (y itself where there is none), u = s·x·(A⊙g)ᵀ, the factors,
    and the norms and scales. Nothing of the weight's size is saved, and no gradient of that size is ever made.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        lora_A: Tensor,  # [R, K]
        lora_B: Tensor,  # [N, R]
        magnitude_row: Tensor | None,  # [N]
        magnitude_col: Tensor | None,  # [K]
        bias: Tensor | None,  # [N]
        dropout: Tensor | None,  # what the backend draws its mask from
        scaling: float,
        norm_order: str,
        detach_norm: bool,
        dropout_p: float,
        eps: float,
        backend: str,
    ) -> Tensor:
        # an absent result comes as an empty tensor
        scales = Scales(
            *(
                result if result.numel() else None
                for result in torch.ops.bora_kernels.scales(
                    weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling, norm_order, eps, backend
                )
            )
        )
        needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
        needs_S, needs_D = needs.sums(scales, norm_order, detach_norm)
        if not needs.norm_paths(scales, norm_order, detach_norm):
            scales = scales._replace(row_product=None, col_product=None)
        y, product, u = torch.ops.bora_kernels.forward(
            x, weight, lora_A, lora_B, scales.row_scale, scales.col_scale, bias, dropout,
            scaling, dropout_p, needs_S, backend,
        )  # fmt: skip
        if not separate_product(x.dtype, bias):
            product = y
        ctx.save_for_backward(
            x if needs.lora_A or needs_D else None,
            weight,
            lora_A,
            lora_B,
            magnitude_row,
            magnitude_col,
            *scales,
            product if needs_S else None,
            u if needs.lora_B else None,
            dropout,
        )
        ctx.needs = needs
        ctx.options = (scaling, norm_order, detach_norm, dropout_p, eps)
        ctx.backend = backend
        ctx.x_dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, lora_A, lora_B, magnitude_row, magnitude_col, *scales, product, u, dropout = ctx.saved_tensors
        dx = dA = dB = dm_row = dm_col = d_bias = None
        if any(ctx.needs):
            dx, dA, dB, dm_row, dm_col = torch.ops.bora_kernels.backward(
                dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, *scales, product, u, dropout,
                *ctx.options, list(ctx.needs), ctx.backend,
            )  # fmt: skip
            gradients = (dx, dA, dB, dm_row, dm_col)
            dx, dA, dB, dm_row, dm_col = (
                gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True)
            )
        if ctx.needs_input_grad[6]:
            d_bias = dy.sum(0)
        return dx, None, dA, dB, dm_row, dm_col, d_bias, None, None, None, None, None, None, None


def bora_linear(
    x: Tensor,
    weight: Tensor,
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
        weight: [N, K], frozen, x's dtype (any of these dtypes under ``torch.autocast``).
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
    ops.check_options(scaling=scaling, norm_order=norm_order, dropout_p=dropout_p, eps=eps)
    if type(weight) not in (Tensor, torch.nn.Parameter) and hasattr(weight, "device_mesh"):
        from .distributed.sharded import bora_linear_sharded  # torch.distributed is imported only when it is used

        return bora_linear_sharded(
            x, weight, lora_A, lora_B, magnitude_row, magnitude_col, bias, scaling=scaling, norm_order=norm_order,
            detach_norm=detach_norm, dropout_p=dropout_p if training else 0.0, eps=eps, backend=backend,
        )  # fmt: skip
    ops.check_tensors(x, weight, lora_A, lora_B, magnitude_row, magnitude_col, bias)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    backend = ops.choose_backend(backend, x.device, x.dtype, lora_A.shape[0])
    if not training:
        dropout_p = 0.0
    if backend == "reference":
        return reference.bora_linear_ref(
            x, weight, lora_A, lora_B, magnitude_row, magnitude_col, bias, scaling=scaling, norm_order=norm_order,
            detach_norm=detach_norm, dropout_p=dropout_p, training=training, eps=eps,
        )  # fmt: skip
    flat = x.reshape(-1, x.shape[-1])
    dropout = ops.draw_dropout(flat, dropout_p, backend) if dropout_p > 0.0 else None
    y = BoraLinearFunction.apply(
        flat, weight, lora_A, lora_B, magnitude_row, magnitude_col, bias, dropout,
        scaling, norm_order, detach_norm, dropout_p, eps, backend,
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0])
