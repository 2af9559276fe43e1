"""RMSNorms as one function, whose output says what it was made from.

A layer that reads the output may keep x for its backward, which others keep anyway, and make the output anew. To all
other readers it is an ordinary tensor; a view of it says nothing and is kept as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import NormOrigin, rms_norm
from . import norms
from .install import fused_forward, must_be_plain, plain


def origin(y: Tensor) -> NormOrigin | None:
    """What this tensor was made from, where it is a norm's output and has not been changed since."""
    found, version = getattr(y, "_made_from", (None, None))
    return found if version == _version(y) else None


def _version(y: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or y.is_inference() else y._version


def _problem(module: nn.Module, found: norms.RMSNorm) -> str | None:
    weight = module._parameters.get(found.weight)
    return "its weight is trained" if weight is None or weight.requires_grad else None


@fused_forward("RMSNorm", _problem)
def fused_norm(module: nn.Module, found: norms.RMSNorm, *args: Any, **kwargs: Any) -> Any:
    """The module's forward with one input as one function; every other call by its own forward."""
    weight = module._parameters.get(found.weight)
    if len(args) == 1 and not kwargs and weight is not None and not weight.requires_grad and not must_be_plain():
        x, eps = args[0], vars(module).get(found.eps)
        if type(x) is Tensor and type(weight) is nn.Parameter and x.dtype == weight.dtype and x.device == weight.device:
            if isinstance(eps, float) and x.ndim > 0 and x.shape[-1] == weight.shape[0]:
                y = rms_norm(x, weight, eps, found.offset)
                made_from = NormOrigin(x.detach(), weight, found.offset, eps)
                y._made_from = made_from, _version(y)  # type: ignore[attr-defined]
                return y
    return plain(module, *args, **kwargs)
