"""W' of a module: handed out dense, or run on in place of W0 and the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import quantized
from .contract import Adapter, NormOrder, Options
from .ops import adapted_weight
from .quantized.module import QuantizedWeight, StoredWeight
from .rounding import round_weight


class Mergeable(nn.Module):
    """What ``FusedBoraLinear`` does with W' but the computation of its forward."""

    in_features: int
    out_features: int
    weight: Any  # W0: a tensor, or a ``QuantizedWeight``
    bias: Any
    lora_A: Tensor
    lora_B: Tensor
    magnitude_row: Tensor | None
    magnitude_col: Tensor | None
    scaling: float
    norm_order: NormOrder
    compute_dtype: torch.dtype | None
    merged_weight: Tensor | None  # W' while merged; ``weight`` is always W0
    merged_quantized: StoredWeight | None  # or W' quantized again

    def _dense_weight(self) -> Tensor:
        """W0: the weight itself, or a quantized one made dense for the caller, not rounded further than in forward."""
        if isinstance(self.weight, Tensor):
            return self.weight
        return self.weight.stored().dense(self.compute_dtype or self.weight.layout.exact_dtype)

    @torch.no_grad()
    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' [out_features, in_features], computed in float32 and rounded once; no gradient.

        In half precision the rounding has a fixed dither, so that updates below half a unit in the last place are not
        lost: an error of less than one unit, zero on average (``rounding.round_weight``). A layer that was not trained
        gives W0 to the bit.

        Its dtype is ``dtype`` or the weight's; over a quantized weight ``compute_dtype`` or what that stands for. A
        DTensor, sharded as the weight is, where the layer is tensor parallel. Raises TypeError for parameters that are
        sharded otherwise: call this where they are whole, as under FSDP's ``unshard()``.
        """
        compute: Callable[..., Tensor] = adapted_weight.effective_weight
        if hasattr(self.weight, "device_mesh"):
            from .ops.sharded.linear import effective_weight_sharded as compute
        adapter = Adapter(self.lora_A, self.lora_B, self.magnitude_row, self.magnitude_col)
        merged = compute(self._dense_weight(), adapter, Options(self.scaling, self.norm_order))
        return round_weight(merged, dtype or self.compute_dtype or self.weight.dtype)

    def delta_weight(self) -> Tensor:
        """W' − W0 [out_features, in_features] in float64 (float32 on devices without it); no gradient.

        Merged or not; over a quantized weight W0 is what that stands for. Not for parameters that are sharded.
        """
        adapter = Adapter(self.lora_A, self.lora_B, self.magnitude_row, self.magnitude_col)
        return adapted_weight.change(self._dense_weight(), adapter, Options(self.scaling, self.norm_order))

    @property
    def merged(self) -> bool:
        """Whether the layer runs on the merged weight."""
        return self.merged_weight is not None or self.merged_quantized is not None

    def merge(self, requantize: bool = False) -> None:
        """Run on W' as a plain linear layer until ``unmerge``; changes of the adapter have no effect meanwhile.

        ``weight`` stays W0, in memory and in ``state_dict``, so that nothing is lost however often a layer is merged.

        Over a quantized weight W' is dense in ``effective_weight``'s dtype, or with ``requantize=True`` quantized again
        in the weight's own layout. That takes as little memory as W0, and it rounds as quantization does: W' then errs
        by about a tenth of its norm in 4 bits and a hundredth in 8, and updates smaller than a step are lost.

        Raises:
            ValueError: for ``requantize=True`` over a dense weight, or one whose layout cannot be made anew.
        """
        if requantize and isinstance(self.weight, Tensor):
            raise ValueError(f"requantize must be False over a dense weight of {self.weight.dtype}, got True")
        if self.merged:
            return
        with torch.inference_mode(False):  # a layer may be merged there, and run where gradients are recorded
            merged = self.effective_weight()
        if requantize and isinstance(self.weight, QuantizedWeight):
            self.merged_quantized = StoredWeight(quantized.quantize_like(merged, *self.weight.stored()))
        else:
            self.merged_weight = merged

    def unmerge(self) -> None:
        """Run on W0 and the adapter again. W0 was never changed."""
        self.merged_weight = self.merged_quantized = None

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A frozen, dense ``torch.nn.Linear`` with ``effective_weight(dtype)`` and the bias, free of this package."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.effective_weight(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(linear.weight.dtype, copy=True), requires_grad=False)
        return linear.train(self.training)
