"""BoRA linear layers for PEFT."""

from __future__ import annotations

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..._private import tensor_of
from ...contract import Adapter, Backend, NormOrder
from ...functional import bora_linear
from ...serving import batches
from .config import BoraConfig
from .layers import BoraLayer


class BoraLinear(BoraLayer, lora.Linear):
    """``nn.Linear`` or transformers' ``Conv1D`` (a linear layer with a transposed weight) on the fused layer."""

    backend: Backend | None = None  # as in ``bora_linear``; None picks by device

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: BoraConfig, **kwargs) -> None:
        self.fan_in_fan_out = isinstance(self.base_layer, Conv1D)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's ``convert_to_lora`` may make the nearest LoRA of W' − W0: not where W0 is not the model's."""
        return not self.moved_base

    def _weight(self) -> Tensor:
        weight = self._base_weight()
        return weight.T if self.fan_in_fan_out else weight  # [N, K]

    def _matrices(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self._weight(), self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def _like_base(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if self.fan_in_fan_out else matrix.contiguous()

    mixes_in_one_product = True  # of a dense weight

    def _mixed(self, x: Tensor, names: list[str], *args, **kwargs) -> Tensor:
        """One read of the weight for all adapters of the batch, where nothing else acts on the layer."""
        factors = self._modules["lora_B"]._modules
        own = [name for name in dict.fromkeys(names) if name in factors]
        if (
            not self.mixes_in_one_product
            or self._acted_on()
            or any("forward" in factors[name].__dict__ or self._share(name) != 1.0 for name in own)
        ):
            return super()._mixed(x, names, *args, **kwargs)

        def adapter(name: str) -> tuple[Adapter, float, NormOrder]:
            tensors = Adapter(self.lora_A[name].weight, self.lora_B[name].weight, *self._magnitudes(name))
            return tensors, self.full_scaling[name], self.norm_order[name]

        shared = self.mixed_batches or batches.MixedBatches()
        with torch.no_grad():
            weight, bias = self._weight(), self.base_layer.bias
            return shared.linear(self, x, names, weight, bias, factors, adapter, self.backend)

    def _product(self, x: Tensor, adapter_name: str) -> Tensor:
        modules = self._modules
        base, dropout = modules["base_layer"], modules["lora_dropout"]._modules[adapter_name]
        rows, columns = modules["lora_magnitude_vector_row"]._modules, modules["lora_magnitude_vector_col"]._modules
        weight = tensor_of(base, "weight")
        return bora_linear(  # tensors and options one by one: what collects them costs host time in every call
            x,
            weight.T if self.fan_in_fan_out else weight,
            tensor_of(modules["lora_A"]._modules[adapter_name], "weight"),
            tensor_of(modules["lora_B"]._modules[adapter_name], "weight"),
            tensor_of(rows[adapter_name], "weight") if adapter_name in rows else None,
            tensor_of(columns[adapter_name], "weight") if adapter_name in columns else None,
            tensor_of(base, "bias"),
            scaling=self.full_scaling[adapter_name],
            norm_order=self.norm_order[adapter_name],
            detach_norm=self.detach_norm[adapter_name],
            dropout_p=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
            training=dropout.training,
            backend=self.backend,
        )
