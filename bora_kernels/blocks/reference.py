"""What the blocks compute, written down plainly: dense weights, PyTorch's own derivatives, any dtype and device.

    gated MLP      y = down(act(gate(x))⊙up(x))
    shared input   y_i = layer_i(x)
    RMSNorm        y = x/√(mean x² + eps)⊙(offset + w)

A layer is a ``Projection``, or any tuple of weight, bias, adapter and options in this order. Nothing is shared with
what it judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import bora_linear_ref

_ACTIVATIONS = {
    "silu": lambda e: e * torch.sigmoid(e),
    "gelu": lambda e: e * (1 + torch.erf(e / 2**0.5)) / 2,
    "gelu_tanh": lambda e: e * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (e + 0.044715 * e**3))) / 2,
}


def gated_mlp_ref(x: Tensor, gate: Any, up: Any, down: Any, activation: str) -> Tensor:
    """y [..., N] of x [..., K]."""
    h = _ACTIVATIONS[activation](linear_ref(x, gate)) * linear_ref(x, up)
    return linear_ref(h, down)


def shared_input_ref(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs [..., N_i] of x [..., K]."""
    return tuple(linear_ref(x, layer) for layer in layers)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """y [..., K] of x [..., K] and weight [K]."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight)


def linear_ref(x: Tensor, layer: Any) -> Tensor:
    """One layer, without dropout."""
    weight, bias, adapter, options = layer[:4]
    if adapter is None:
        return F.linear(x, weight, bias)
    return bora_linear_ref(
        x, weight, adapter.lora_A, adapter.lora_B, adapter.magnitude_row, adapter.magnitude_col, bias,
        scaling=options.scaling, norm_order=options.norm_order, detach_norm=options.detach_norm, eps=options.eps,
    )  # fmt: skip
