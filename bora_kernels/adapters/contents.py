"""What a file says of the model that was converted: the model inside its wrappers, what else was trained, its names."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping

import torch
from torch import nn

from ..modules import FusedBoraLinear
from .conversion import adapter_parameters, matches, named_modules

INSIDE = "base_layer."  # in PEFT's names, of what a layer had before it was adapted
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model that was converted, and what wrappers around it put before its names."""
    prefix = ""
    while True:
        if isinstance(model, _WRAPPERS):
            model, prefix = model.module, f"{prefix}module."
        elif (inner := model._modules.get("_orig_mod")) is not None:
            model = inner
        else:
            return model, prefix


def also_trained(model: nn.Module) -> dict[str, nn.Module]:
    """Modules besides the adapted layers with parameters of their own that require a gradient."""
    return {
        name: module
        for name, module in named_modules(model)
        if not isinstance(module, FusedBoraLinear)
        and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    }


def trained_inside(layers: Mapping[str, FusedBoraLinear]) -> list[str]:
    """Names of what adapted layers train besides their adapters, such as biases."""
    return [
        f"{name}.{key}"
        for name, layer in layers.items()
        for key, parameter in layer.named_parameters()
        if parameter.requires_grad and key not in adapter_parameters(layer)
    ]


def exact_targets(model: nn.Module, layers: Mapping[str, FusedBoraLinear]) -> list[str] | str:
    """The layers' names, or a regular expression where PEFT would take a name for the end of another one."""
    ambiguous = any(matches(layers, name) for name, _ in named_modules(model) if name not in layers)
    return "|".join(map(re.escape, layers)) if ambiguous else list(layers)


def auto_mapping(model: nn.Module) -> dict[str, str] | None:
    """The class of a model of transformers, from which PEFT's AutoPeftModel makes the base model."""
    if not hasattr(type(model), "from_pretrained"):
        return None
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def alpha_of(layer: FusedBoraLinear) -> float:
    """What the layer's scaling is made of: its alpha, but where ``scaling`` was set since."""
    divisor = math.sqrt(layer.r) if layer.rslora else layer.r
    return layer.alpha if layer.alpha / divisor == layer.scaling else layer.scaling * divisor


def name_in_peft(name: str, layers: Container[str]) -> str:
    """PEFT's name of a tensor, where one of an adapted layer is of the layer inside."""
    layer, _, own = name.rpartition(".")
    return f"{layer}.{INSIDE}{own}" if layer in layers else name
