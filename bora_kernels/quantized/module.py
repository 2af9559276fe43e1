"""A quantized weight as a tensor of a module: moved with it, and saved with it where it is its weight."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from .._private import tensor_of
from .weights import TENSOR_NAMES, Quantized


class StoredWeight(nn.Module):
    """A quantized weight as a tensor of a module that is in no state dict.

    Its tensors move with the module; a change of dtype (``.half()``) leaves them alone.
    """

    def __init__(self, stored: Quantized) -> None:
        super().__init__()
        self.layout = stored.layout
        self.names = TENSOR_NAMES[self.layout.kind][: len(stored.tensors)]
        for name, tensor in zip(self.names, stored.tensors, strict=True):
            self._keep(name, tensor)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that it stands for."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        return getattr(self, self.names[0]).device

    def stored(self) -> Quantized:
        """What ``bora_linear`` takes."""
        return Quantized(self.layout, tuple([tensor_of(self, name) for name in self.names]))

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        kind, shape, dtype, block_size = self.layout
        return f"{kind}, shape={list(shape)}, dtype={dtype}, block_size={list(block_size)}"


class QuantizedWeight(StoredWeight):
    """A frozen quantized weight that is saved and loaded with its module.

    Its tensors are frozen parameters that share the memory of those given: DistributedDataParallel would broadcast
    buffers before every forward. A state dict that holds another layout is refused.
    """

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))

    def get_extra_state(self) -> Tensor:
        """The layout, as bytes of JSON in a tensor, which safetensors can store."""
        kind, shape, dtype, block_size = self.layout
        return torch.tensor(list(json.dumps([kind, shape, str(dtype), block_size]).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        own = self.get_extra_state()
        if not torch.equal(state.cpu(), own):
            found, expected = (bytes(t.tolist()).decode() for t in (state, own))
            raise ValueError(f"state_dict must hold a weight of layout {expected}, got {found}")
