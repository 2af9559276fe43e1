"""A batch of several adapters over one weight, for inference: PyTorch operations, and the operator that hands over.

    u_t = (x_t⊙g_i)·A_iᵀ        y_t = a_i⊙[ (x_t⊙g_i)·W0ᵀ + u_t·(s·B_i)ᵀ ] + bias        (i the slot of token t)

W0 is read once for all adapters. The equations are (1) and (2) of ``torch_backend`` with an adapter for each token;
``kernels.mixed`` has the kernels, and says what ``index`` holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from ..contract import Backend, Slots, accumulation_dtype, evaluation
from .operators import context
from .torch_backend import folded, wide_matmul


def mixed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, slots: Slots, tokens: int, backend: Backend
) -> Tensor:
    """y [M, N] in x's dtype for x [M, K], whose entries are ``tokens`` rows each; index [4, M / tokens]."""
    chosen = evaluation(backend, weight.shape)
    if torch.compiler.is_compiling():
        return _operator(x, weight, bias, index, *slots, tokens, chosen)
    return _mixed_linear(x, weight, bias, index, *slots, tokens, chosen)


def _mixed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    row_scale: Tensor,
    col_scale: Tensor,
    tokens: int,
    backend: str,
) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    slots = Slots(lora_A, lora_B, row_scale, col_scale)
    with context(backend, x):
        if backend == "triton":
            from . import triton_backend  # Triton is imported only when it is used

            return triton_backend.mixed_linear(x, weight, bias, index, slots, tokens)
        return _by_operations(x, weight, bias, index, slots, tokens, wide=backend == "dense")


def _by_operations(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, slots: Slots, tokens: int, *, wide: bool
) -> Tensor:
    """All adapters' factors meet all tokens, and what is not a token's own is set to zero between them.

    ``wide`` keeps x⊙g as it is, for weights with a short axis, where rounding would show in few elements.
    """
    acc = accumulation_dtype(x.dtype)
    slot = torch.empty_like(index[0]).scatter_(0, index[0].long(), index[1]).repeat_interleave(tokens).long()
    scale = slots.col_scale[slot]
    scaled = x.to(acc) * scale
    u = scaled @ slots.lora_A.flatten(0, 1).to(acc).T
    owner = torch.arange(slots.lora_A.shape[0], device=x.device).repeat_interleave(slots.lora_A.shape[1])
    u = u.masked_fill(owner != slot[:, None], 0)
    y = wide_matmul(scaled if wide else folded(x, scale), weight.T)
    y = (y + u @ slots.lora_B.flatten(0, 1).to(acc)) * slots.row_scale[slot]
    return (y if bias is None else y + bias).to(x.dtype)


_library = define(
    "mixed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor lora_A, Tensor lora_B, Tensor row_scale,"
    " Tensor col_scale, int tokens, str backend) -> Tensor"
)
_library.impl("mixed_linear", _mixed_linear, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bora_kernels::mixed_linear", lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]), lib=_library
)
_operator = torch.ops.bora_kernels.mixed_linear.default
