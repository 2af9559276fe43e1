"""The weight that a convolution is given on a device whose word the host does not read: a copy of W0, or V.

V = W0 + s·B·A        p⊙V⊙q, rounded once, with dither, where ``word`` is not 0
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._library import define
from ..contract import Adapter, Options, accumulation_dtype
from ..rounding import round_weight
from . import validation
from .adapted_weight import effective_weight
from .operators import context


class Tensors(NamedTuple):
    """What ``weight_or_v`` reads."""

    weight: Tensor  # [N, K, *kernel]
    lora_A: Tensor  # [R, K, *kernel]
    lora_B: Tensor  # [N, R]
    word: Tensor  # [4]
    p: Tensor | None  # [N]
    q: Tensor | None  # [K]


def weight_or_v(tensors: Tensors, scaling: float, dtype: torch.dtype) -> Tensor:
    """W0 in ``dtype``; where there is word p⊙V⊙q, rounded once, with dither."""
    if tensors.weight.device.type == "cuda":
        return torch.ops.bora_kernels.weight_or_v(*tensors, scaling, dtype)
    return by_operations(tensors, scaling, dtype)


def by_operations(tensors: Tensors, scaling: float, dtype: torch.dtype) -> Tensor:
    """``weight_or_v`` in PyTorch's operations."""
    weight, lora_A, lora_B, word, p, q = tensors
    wide = weight.flatten(1).to(accumulation_dtype(torch.promote_types(weight.dtype, dtype)))
    V = effective_weight(wide, Adapter(lora_A.flatten(1), lora_B, None, None), Options(scaling))
    V = times_powers(V.view(weight.shape), p, q).flatten(1)
    chosen = torch.where(word.amax(0) != 0, round_weight(V, dtype), wide.to(dtype))
    return chosen.view(weight.shape)


def times_powers(weight: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
    """p⊙weight⊙q for [N, K, *kernel]."""
    if p is not None:
        weight = weight * p.view(-1, *(1,) * (weight.ndim - 1))
    return weight if q is None else weight * q.view(-1, *(1,) * (weight.ndim - 2))


def by_kernel(tensors: Tensors, scaling: float, dtype: torch.dtype) -> Tensor:
    """``weight_or_v`` in one pass over the weight."""
    from ..kernels import weight_or_v  # Triton is imported only when it is used

    weight, lora_A, lora_B, word, p, q = tensors
    last = _channels_last(weight)
    with context("triton", weight):
        W, A = (_in_memory_order(t, last) for t in (weight, lora_A))
        (out,) = weight_or_v.weight_or_v(W, A, lora_B, word, p, q, scaling=scaling, channels_last=last, dtype=dtype)
    return _as_weight(out, weight)


def _weight_or_v(weight, lora_A, lora_B, word, p, q, scaling, dtype):
    tensors = Tensors(weight, lora_A, lora_B, word, p, q)
    backend = validation.choose_backend(None, weight.device, dtype, lora_A.shape[0])
    wide = torch.float64 in (weight.dtype, lora_A.dtype, lora_B.dtype)
    return (by_operations if backend == "torch" or wide else by_kernel)(tensors, scaling, dtype)


def _weight_or_v_fake(weight, lora_A, lora_B, word, p, q, scaling, dtype):
    shape = _in_memory_order(weight, _channels_last(weight)).shape
    return _as_weight(weight.new_empty(shape, dtype=dtype), weight)


def _channels_last(weight: Tensor) -> bool:
    """Not of a pointwise convolution, whose two formats are one: PyTorch would take the input for channels last too."""
    return weight.stride(1) == 1 and not weight.is_contiguous()


def _in_memory_order(t: Tensor, channels_last: bool) -> Tensor:
    """[N, K, *kernel] as [N, K, taps], or [N, taps, K] for channels last: a view, for a weight that is dense."""
    return t.flatten(2).transpose(1, 2) if channels_last else t.flatten(2)


def _as_weight(t: Tensor, weight: Tensor) -> Tensor:
    """[N, K, *kernel] with that memory."""
    t = t.transpose(1, 2) if _channels_last(weight) else t
    return t.unflatten(2, weight.shape[2:])


_library = define(
    "weight_or_v(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor word, Tensor? p, Tensor? q, float scaling,"
    " ScalarType dtype) -> Tensor"
)
_library.impl("weight_or_v", _weight_or_v, "CompositeExplicitAutograd")
torch.library.register_fake("bora_kernels::weight_or_v", _weight_or_v_fake, lib=_library)
