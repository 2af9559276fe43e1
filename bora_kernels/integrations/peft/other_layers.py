"""BoRA embeddings and convolutions for PEFT."""

from __future__ import annotations

from peft.tuners.lora import layer as lora
from torch import Tensor

from ...functional import bora_conv, bora_embedding
from . import through
from .layers import BoraLayer


class BoraEmbedding(BoraLayer, lora.Embedding):
    """``nn.Embedding``: a row is a dimension, a column a token; as in PEFT, dropout has no effect."""

    def _matrices(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, B = self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]
        return self._base_weight().T, A, B

    def _like_base(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def _product(self, x: Tensor, adapter_name: str) -> Tensor:
        base = self.base_layer
        return bora_embedding(
            x,
            base.weight,
            self.lora_embedding_A[adapter_name],
            self.lora_embedding_B[adapter_name],
            *self._magnitudes(adapter_name),
            **self._options(adapter_name),
            padding_idx=base.padding_idx,
        )

    def _adapted(self, x: Tensor, adapter_name: str) -> Tensor:
        y = super()._adapted(x, adapter_name)
        if through.is_acted_on(self.base_layer):  # the base layer's call scales
            return y
        embed_scale = self._get_embed_scale()
        return y if embed_scale is None else y * embed_scale.to(y.dtype)


class _BoraConvNd(BoraLayer):
    """A convolution of one group: a row is an output channel, a column an input channel with its kernel's taps."""

    def _matrices(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        return self._base_weight().flatten(1), A.flatten(1), B.flatten(1)

    def _taps(self) -> int:
        return self._base_weight().shape[2:].numel()

    def _like_base(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self._base_weight().shape)

    def _product(self, x: Tensor, adapter_name: str) -> Tensor:
        base = self.base_layer
        row, col = self._magnitudes(adapter_name)
        return bora_conv(
            x,
            base.weight,
            self.lora_A[adapter_name].weight,
            self.lora_B[adapter_name].weight.flatten(1),
            row,
            col,
            base.bias,
            lambda t, kernel: base._conv_forward(t, kernel, None),
            **self._options(adapter_name),
            **self._dropout(adapter_name),
        )


class BoraConv1d(_BoraConvNd, lora.Conv1d):
    """``nn.Conv1d``."""


class BoraConv2d(_BoraConvNd, lora.Conv2d):
    """``nn.Conv2d``."""


class BoraConv3d(_BoraConvNd, lora.Conv3d):
    """``nn.Conv3d``."""
