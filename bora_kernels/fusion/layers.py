"""PEFT's own LoRA and DoRA layers on the computation of this package.

    LoRA   y = x·W0ᵀ + s·(x·Aᵀ)·Bᵀ + bias        DoRA   y = m/‖W0 + s·B·A‖_row ⊙ (x·W0ᵀ + s·(x·Aᵀ)·Bᵀ) + bias

Parameters, names and files stay PEFT's, and so does every call that this file and ``mixed``, for ``adapter_names``, do
not know to do the same.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..contract import given
from ..ops.autograd import adapted_linear
from . import mixed
from .install import fused_forward, must_be_plain, plain
from .members import can_run_on, is_plain, read


def _problem(layer: nn.Module) -> str | None:
    projection = read(layer)
    return projection if isinstance(projection, str) else None


@fused_forward("PEFT layer", _problem)
def adapted_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's forward with one input on this package's kernels; every other call as PEFT has it."""
    if len(args) == 1 and kwargs.get("adapter_names") is not None:
        y = mixed.output(layer, args[0], **kwargs)
        if y is not None:
            return y
    elif len(args) == 1 and not kwargs and not must_be_plain():
        x, projection = args[0], read(layer)
        if not isinstance(projection, str) and is_plain(x, projection) and can_run_on(x, projection) is None:
            weight, bias, adapter, options, _ = projection
            return adapted_linear(x, weight, given(adapter), bias, options)
    return plain(layer, *args, **kwargs)
