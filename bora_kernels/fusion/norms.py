"""RMSNorm, found by its arithmetic: y = x/√(mean x² + eps)⊙(offset + w).

A random weight and random inputs tell what a module with one vector computes, tiny inputs tell its eps, which has to be
an attribute. ``offset`` is 0, or 1 as in Gemma.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .search import Watched, on_the_side

_TINY = 1e-3  # of inputs whose squares are about as large as the eps in use


class RMSNorm(NamedTuple):
    """The name of the weight, what is added to it, and the name of eps."""

    weight: str
    offset: float
    eps: str


def rms_norm(module: nn.Module) -> RMSNorm | None:
    """How this module is an RMSNorm, or None."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if len(parameters) != 1 or module._buffers or any(child is not None for child in module._modules.values()):
        return None
    ((name, weight),) = parameters.items()
    if weight.ndim != 1 or weight.numel() < 2 or not weight.is_floating_point():
        return None
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    generator = torch.Generator().manual_seed(0)
    w = (torch.rand(weight.numel(), generator=generator) + 0.5).to(device)
    x = torch.randn(2, 3, weight.numel(), generator=generator).to(device)
    found = _call(module, name, w, x)
    if found is None:
        return None
    for offset in (0.0, 1.0):
        for eps in [key for key, value in vars(module).items() if isinstance(value, float) and 0 < value < 1e-2]:
            value = vars(module)[eps]
            if not _matches(found, expected(x, w, offset, value), 1e-5):
                continue
            tiny = _call(module, name, w, _TINY * x)
            half = _call(module, name, w.bfloat16(), x.bfloat16())
            if tiny is None or half is None or half.dtype != torch.bfloat16:
                return None
            rounded = expected(x.bfloat16(), w.bfloat16(), offset, value)
            if _matches(tiny, expected(_TINY * x, w, offset, value), 1e-5) and _matches(half, rounded, 2**-6):
                return RMSNorm(name, offset, eps)
    return None


def expected(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """y in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight.float())


def _matches(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return found.shape == wanted.shape and torch.allclose(found.float(), wanted, rtol=tolerance, atol=0)


def _call(module: nn.Module, name: str, weight: Tensor, x: Tensor) -> Tensor | None:
    """The module's forward with another weight, or None where it is no function of one tensor alone."""
    attributes, parameter = dict(vars(module)), module._parameters[name]
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    try:
        with on_the_side(x.device), Watched() as watched:
            y = type(module).forward(module, x)
    except Exception:  # whatever a forward may raise that is none of ours
        return None
    finally:
        module._parameters[name] = parameter
    return y if isinstance(y, Tensor) and not watched.asked and dict(vars(module)) == attributes else None
