"""The scales of embeddings and convolutions, differentiable in closed form.

Both are linear maps: an embedding is one of one-hot vectors, a convolution one of patches. With a *row* for each
output feature (embedding dimension, output channel) and a *column* for each input feature (token, input channel), the
weight is W0 [N, K, taps], where taps counts those of a convolution's kernel and is 1 otherwise, and

    V  = W0 + s·B·A        a = m_r / ‖·‖_row        g = m_c / ‖·‖_col        W' = a⊙V⊙g

where a row's norm runs over K and the taps, a column's over N and the taps. ``axis_scales`` gives a and g; everything
else is a few operations that autograd differentiates. W' is never made, and no gradient of the weight's size is kept:
a magnitude's gradient is d_scale / norm, and the paths through the norms are those of the linear layer (8) to (11).

Source: BoRA, arXiv 2412.06441, section 3; detached norms: DoRA, arXiv 2402.09353, section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Adapter, Options, Scales, given
from . import adapted_weight, transforms, validation


def axis_scales(
    weight: Tensor, adapter: Adapter, options: Options, *, judge: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """a [N] and g [K] (None without their magnitude), differentiable in the adapter's tensors.

    With ``judge`` the third says whether lines are cancelled (``Scales.cancelled``); None without magnitudes.

    Shapes: weight [N, K, *taps], lora_A [R, K, *taps], lora_B [N, R], magnitude_row [N], magnitude_col [K]. The scales
    are float32 (float64 for a float64 weight). Norms are clamped from below at eps, with no gradient through a clamp.

    Raises ValueError for an unknown norm_order or a weight that requires a gradient.
    """
    validation.check_options(options)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen (requires_grad=False): no gradient is computed for it")
    if not any(adapter.members):
        return None, None, None
    transforms.refuse("an embedding or a convolution", "the layer must be linear", weight, *adapter)
    row_scale, col_scale, word = _AxisScales.apply(weight, *adapter, options, judge)
    return row_scale, col_scale, word if judge else None


class _AxisScales(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude_row: Tensor | None,
        magnitude_col: Tensor | None,
        options: Options,
        judge: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
        matrix, adapter_of_matrix, taps = _as_matrix(weight, adapter)
        scales = adapted_weight.norms_and_scales(matrix, adapter_of_matrix, options, taps=taps, judge=judge)
        ctx.save_for_backward(weight, *adapter, *scales[:4])
        ctx.options, word = options, given(scales.cancelled)
        ctx.mark_non_differentiable(word)
        return scales.row_scale, scales.col_scale, word

    @staticmethod
    @transforms.once_differentiable
    def backward(ctx, d_row: Tensor | None, d_col: Tensor | None, _: Tensor | None):
        weight, *tensors = ctx.saved_tensors
        adapter, scales = Adapter(*tensors[:4]), Scales(*tensors[4:])
        dA = dB = None
        with transforms.without_autocast(weight.device):
            dm_row = None if scales.row_norm is None else given(d_row) / scales.row_norm
            dm_col = None if scales.col_norm is None else given(d_col) / scales.col_norm
            if not ctx.options.detach_norm:
                matrix, adapter_of_matrix, taps = _as_matrix(weight, adapter)
                dm_row, dm_col, dA, dB = adapted_weight.norm_paths(
                    matrix, adapter_of_matrix, scales, dm_row, dm_col, ctx.options, taps=taps
                )
                dA = dA.view(adapter.lora_A.shape)
        gradients = zip((dA, dB, dm_row, dm_col), adapter, strict=True)
        return None, *(None if g is None else g.to(given(t).dtype) for g, t in gradients), None, None


def _as_matrix(weight: Tensor, adapter: Adapter) -> tuple[Tensor, Adapter, int]:
    """The weight [N, K·taps], its adapter, and how many taps a column has."""
    return weight.flatten(1), adapter._replace(lora_A=adapter.lora_A.flatten(1)), weight.shape[2:].numel()
