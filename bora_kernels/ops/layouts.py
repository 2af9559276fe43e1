"""How tensors lie in memory, recognized again at little host time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def _tensor_guards() -> Any:
    """What guards of torch.compile compare tensors with, in C++: a fifth of the time. None where PyTorch has it not."""
    try:
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:
        return None
    return TensorGuards


TensorGuards = _tensor_guards()


class Layouts:
    """Shapes, strides, dtypes and devices of some tensors, None among them."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        present = [t for t in tensors if t is not None]
        self._layouts = _layouts(tensors)
        self._count, self._guards = len(present), None
        if TensorGuards is not None:
            sizes, strides = [list(t.shape) for t in present], [list(t.stride()) for t in present]
            self._guards = TensorGuards(*present, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def same(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these tensors, with None at the same places, lie likewise, and nothing else tells them apart either.

        That is their types, whether they require gradients, and what the dispatcher does with them at present. False
        where this PyTorch cannot tell.
        """
        present = [t for t in tensors if t is not None]
        return self._guards is not None and len(present) == self._count and self._guards.check(*present)

    def hold(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these tensors, with None at the same places, lie likewise."""
        return self.same(tensors) or _layouts(tensors) == self._layouts


def _layouts(tensors: Sequence[Tensor | None]) -> list:
    return [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
