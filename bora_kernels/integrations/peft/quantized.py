"""BoRA over quantized linear layers in PEFT (QBoRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...functional import bora_linear
from ...quantized import Quantized, read
from ...rounding import round_weight
from .linear import BoraLinear


class BoraQuantizedLinear(BoraLinear):
    """A linear layer of bitsandbytes (NF4, FP4, 8-bit) or torchao (int8, float8 weight-only), which stays quantized.

    Merging puts a dense ``nn.Linear`` with W' in the place of the quantized layer, because quantizing W' again would
    lose the adapter's small updates; unmerging puts the quantized layer itself back.
    """

    mixes_in_one_product = False
    merged_dtype: torch.dtype | None = None  # what the model around it runs in, where that is known

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As ``BoraLayer.forward``; a merged layer takes inputs of any dtype as the quantized one does."""
        if self.merged and not self.disable_adapters:
            return super().forward(x.to(self.base_layer.weight.dtype), *args, **kwargs).to(x.dtype)
        return super().forward(x, *args, **kwargs)

    def _quantized(self) -> Any:
        return self.__dict__.get("quantized_layer") or self.base_layer

    def _stored(self) -> Quantized:
        stored = read(self._quantized())
        if stored is None:
            raise TypeError(f"base_layer must be quantized, got a {type(self._quantized()).__name__} that is not")
        return stored

    def _weight(self) -> Tensor:
        """W0 made dense, for the caller alone, not rounded further than in forward."""
        stored = self._stored()
        return stored.dense(getattr(self._quantized(), "compute_dtype", None) or stored.layout.exact_dtype)

    def effective_weight(self, adapter_name: str) -> Tensor:
        """W', dense in ``merged_dtype`` or else the dtype that the layer computes in or stands for; no gradient."""
        dtype = self.merged_dtype or getattr(self._quantized(), "compute_dtype", None) or self._stored().dtype
        return round_weight(super().effective_weight(adapter_name), dtype)

    def narrow_magnitudes(self, adapter_name: str) -> None:
        """Nothing: a quantized weight's dtype is none for magnitudes."""

    own_product = True  # of the library, which cannot be taken out of the layer's forward

    def _product(self, x: Tensor, adapter_name: str) -> Tensor:
        base = self._quantized()
        row, col = self._magnitudes(adapter_name)
        y = bora_linear(
            x.to(getattr(base, "compute_dtype", None) or x.dtype),
            self._stored(),
            self.lora_A[adapter_name].weight,
            self.lora_B[adapter_name].weight,
            row,
            col,
            base.bias,
            **self._options(adapter_name),
            **self._dropout(adapter_name),
            backend=self.backend,
        )
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _swap_in(self, merged: Tensor) -> None:
        base = self.base_layer
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        dense.weight = nn.Parameter(merged, requires_grad=False)
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias.detach().to(merged.dtype), requires_grad=False)
        self.__dict__["quantized_layer"] = base  # aside: no part of this module, and in no state dict
        self.base_layer = dense.train(base.training)

    def _restore_state(self, state: dict[str, Tensor], prefix: str) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        state.update(self.quantized_layer.state_dict(prefix=prefix))

    def _swap_out(self) -> None:
        device = self.base_layer.weight.device
        self.base_layer = self.__dict__.pop("quantized_layer").to(device)
