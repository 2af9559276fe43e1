"""LoRA fused by hand: one autograd function of matrix products, as a user who minds speed writes it.

    forward   u = x·Aᵀ    y = x·Wᵀ + bias    y += s·u·Bᵀ
    backward  v = dy·B    dx = dy·W    dx += s·v·A    dA = s·vᵀ·x    dB = s·dyᵀ·u

Beside the frozen layer's two products these are six, in x's dtype. Nothing else runs where the factors have that dtype,
and no pass over x or y in any case, so that a LoRA made of a library's products is hardly faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        u = tokens @ a.T
        y = F.linear(tokens, weight, bias)
        y.addmm_(u, b.T, alpha=scaling)
        ctx.save_for_backward(tokens, weight, a, b, u)
        ctx.scaling, ctx.factor_dtypes = scaling, (lora_A.dtype, lora_B.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, a, b, u = ctx.saved_tensors
        s, (dtype_A, dtype_B) = ctx.scaling, ctx.factor_dtypes
        flat = dy.reshape(-1, dy.shape[-1])
        v = flat @ b
        dx = flat @ weight
        dx.addmm_(v, a, alpha=s)
        dA = torch.addmm(a, v.T, tokens, beta=0, alpha=s)  # beta = 0: a lends its shape alone
        dB = torch.addmm(b, flat.T, u, beta=0, alpha=s)
        return dx.view(*dy.shape[:-1], -1), None, None, dA.to(dtype_A), dB.to(dtype_B), None


class LoraByHand(nn.Module):
    """A frozen linear layer and its LoRA."""

    weight: Tensor
    bias: Tensor | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float

    def __init__(self, linear: nn.Linear, rank: int, scaling: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = scaling
        out_features, in_features = linear.weight.shape
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return _ByHand.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling)
