"""RMSNorm: y = x·r⊙(offset + w), r = 1/√(mean x² + eps), computed in float32 and rounded once.

Its gradient, with t = dy⊙(offset + w):

    dx = r⊙(t − x⊙r²⊙mean(t⊙x))

A layer that reads y may keep ``NormOrigin`` in its place and make y anew: x is kept for the residual branch anyway.
Source: RMSNorm, arXiv 1910.07467; Gemma's norms have offset 1.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import accumulation_dtype
from ..ops import operators, validation


class NormOrigin(NamedTuple):
    """What a norm's output was made from."""

    x: Tensor  # [..., K]
    weight: Tensor  # [K]
    offset: float
    eps: float

    def output(self) -> Tensor:
        """The norm's output again, to the bit."""
        return _output(*self, kernels_for(self.x, self.weight))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """y [..., K] in x's dtype, of a frozen weight [K]; keeps x for backward."""
    kernels = kernels_for(x, weight)
    if offset == 0.0 and x.is_cuda and kernels is None:  # PyTorch keeps x in float32 elsewhere
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, offset, eps, kernels)


def _output(x: Tensor, weight: Tensor, offset: float, eps: float, kernels: ModuleType | None) -> Tensor:
    if kernels is not None:
        return kernels.rms_norm(x, weight, offset, eps)
    if offset == 0.0:
        return F.rms_norm(x, weight.shape, weight, eps)
    acc = accumulation_dtype(x.dtype)
    y = F.rms_norm(x.to(acc), weight.shape, offset + weight.to(acc), eps)
    return y if x.dtype == acc else y.to(x.dtype)  # a last cast that changes nothing has no gradient in PyTorch 2.11


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, offset: float, eps: float, kernels: ModuleType | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.offset, ctx.eps = offset, eps
        return _output(x, weight, offset, eps, kernels)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        if not torch.is_grad_enabled() and (kernels := kernels_for(x, weight, dy)) is not None:
            return kernels.rms_norm_backward(dy, x, weight, ctx.offset, ctx.eps), None, None, None, None
        acc = accumulation_dtype(x.dtype)
        x, t = x.to(acc), dy.to(acc) * (ctx.offset + weight.to(acc))
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        dx = r * (t - x * (r.square() * (t * x).mean(-1, keepdim=True)))
        return dx.to(dy.dtype), None, None, None, None


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """The kernels, where layers that read x run on Triton by default and nothing looks on."""
    x = tensors[0]
    if torch.compiler.is_compiling() or not _on_triton(x.device, x.dtype) or not operators.is_direct(None, *tensors):
        return None
    from . import norm_kernels  # Triton is imported only when it is used

    return norm_kernels if norm_kernels.can_run(x) else None


@lru_cache
def _on_triton(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and validation.triton_problem(device, dtype) is None


def read_by(
    x: Tensor | None, origin: NormOrigin | None
) -> tuple[Tensor | None, Tensor | None, tuple[float, float] | None]:
    """What a stage reads: x, or what x is the norm of and the norm's weight, offset and eps."""
    if origin is None:
        return x, None, None
    if kernels_for(origin.x, origin.weight) is None:
        return origin.output(), None, None
    weight = origin.weight
    return origin.x, weight if weight.is_contiguous() else weight.contiguous(), (origin.offset, origin.eps)
