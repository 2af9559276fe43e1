"""What an adapter is in a bank: its factors and scales, from a layer or from tensors, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Adapter, NormOrder, Options, Slots, accumulation_dtype
from ..modules import FusedBoraLinear
from ..ops import validation
from ..ops.adapted_weight import norms_and_scales
from .cancelled import Judge


@torch.no_grad()
def read(
    name: str,
    adapter: FusedBoraLinear | Sequence[Tensor | None] | None,
    weight: Tensor,
    max_rank: int,
    scaling: float | None,
    norm_order: NormOrder,
    eps: float,
    judge: Judge | None,
) -> Slots | None:
    """One slot: lora_A [R, K], (s·B)ᵀ [R, N] and the scales a [N], g [K]; None for the base layer.

    ``judge`` is handed word of an adapter that may cancel rows or columns of the weight.
    Raises ValueError or TypeError for what cannot be an adapter of this weight; see ``AdapterBank.add``.
    """
    if adapter is None:
        return None
    if isinstance(adapter, FusedBoraLinear):
        tensors, options = _of_layer(adapter, weight, scaling)
    else:
        tensors, options = _of_tensors(adapter, scaling, norm_order, eps)
    validation.check_options(options)
    weight = weight.detach()
    lora_A, lora_B, magnitude_row, magnitude_col = tensors
    no_token = weight.new_empty(0, weight.shape[1])
    validation.check_tensors(no_token, weight, lora_A, lora_B, magnitude_row, magnitude_col, None)
    if lora_A.shape[0] > max_rank:
        raise ValueError(f"lora_A must be of rank at most {max_rank}, got {lora_A.shape[0]}")
    scales = norms_and_scales(weight, tensors.map(lambda tensor: tensor.detach()), options, judge=judge is not None)
    if judge is not None and scales.cancelled is not None:
        judge(name, weight, scales.cancelled)
    row_scale, col_scale = scales.row_scale, scales.col_scale
    wide = accumulation_dtype(weight.dtype)
    ones = torch.ones((), dtype=wide, device=weight.device)
    row_scale = ones.expand(weight.shape[0]) if row_scale is None else row_scale
    if col_scale is None:
        col_scale = ones.expand(weight.shape[1])
    elif weight.dtype == torch.float16:  # x⊙g has to fit
        power = _power_of_two(col_scale)
        row_scale, col_scale = row_scale * power, col_scale / power
    return Slots(lora_A, (options.scaling * lora_B.to(wide)).T, row_scale, col_scale)


def is_same(weight: object, other: Tensor) -> bool:
    """Whether a weight is this one, or a view of the same memory."""
    return weight is other or (
        isinstance(weight, Tensor)
        and (weight.shape, weight.stride(), weight.dtype, weight.data_ptr())
        == (other.shape, other.stride(), other.dtype, other.data_ptr())
    )


def _of_tensors(
    tensors: Sequence[Tensor | None], scaling: float | None, norm_order: NormOrder, eps: float
) -> tuple[Adapter, Options]:
    if not isinstance(tensors, Sequence) or isinstance(tensors, str) or len(tensors) != 4:
        raise TypeError(
            "adapter must be a layer, or lora_A, lora_B, magnitude_row and magnitude_col (None where there is none), "
            f"got {type(tensors).__name__}"
        )
    if scaling is None:
        raise ValueError("scaling must be given with an adapter's tensors, usually alpha / rank, got None")
    return Adapter(*tensors), Options(float(scaling), norm_order, eps=eps)  # type: ignore[arg-type] # checked with the rest


def _of_layer(layer: FusedBoraLinear, weight: Tensor, scaling: float | None) -> tuple[Adapter, Options]:
    if scaling is not None:
        raise ValueError(f"scaling must be None with a layer, which has its own, got {scaling}")
    if layer.merged:
        raise ValueError("adapter must be a layer that is not merged, got one that is: call unmerge() first")
    own = layer.weight
    if not isinstance(own, Tensor) or own.shape != weight.shape:
        got = list(own.shape) if isinstance(own, Tensor) else "a quantized one"
        raise ValueError(f"adapter must be over the bank's weight {list(weight.shape)}, got one over {got}")
    if not is_same(own, weight) and not (
        own.dtype == weight.dtype and own.device == weight.device and torch.equal(own, weight)
    ):
        raise ValueError("adapter must be over the bank's weight, got one over another weight of the same shape")
    adapter = Adapter(layer.lora_A, layer.lora_B, layer.magnitude_row, layer.magnitude_col)
    return adapter, Options(layer.scaling, layer.norm_order)


def _power_of_two(scale: Tensor) -> Tensor:
    """The power of two next to the largest scale [], or 1 where that is within a factor of 8 of 1."""
    exponent = scale.abs().amax().log2().nan_to_num(0.0, 0.0, 0.0).round().clamp(-60, 60)
    exponent = torch.where(exponent.abs() < 4, 0, exponent).to(torch.int32)
    return ((exponent + 127) << 23).view(torch.float32)  # exact, unlike exp2
