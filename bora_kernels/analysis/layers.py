"""Layers of this package, PEFT's and plain ones, seen alike: what is trained of each, and how W' follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import quantized
from ..adapters.conversion import adapter_parameters, named_modules
from ..modules import FusedBoraLinear
from ..reference import bora_weight_ref

_PEFT_PREFIX = "base_model.model."
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # PEFT's ways to start A and B that leave W0 as it was


class View(NamedTuple):
    """A layer as what is trained of it, and how W' follows from that."""

    parameters: Mapping[str, Tensor]  # lora_A, lora_B, magnitude_row, magnitude_col as far as there; or weight alone
    base: Callable[[], Tensor]  # W0 [N, K], dense
    options: Mapping[str, Any]
    transposed: bool = False  # whether the model keeps W0 as [K, N]

    @torch.no_grad()
    def weight(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """W' [N, K] of these parameters, not rounded to half precision."""
        if "weight" in parameters:
            return parameters["weight"]
        base, arguments = self.base(), {**parameters, **self.options}
        return bora_weight_ref(base.to(torch.promote_types(base.dtype, torch.float32)), **arguments)


def weight_name(name: str) -> str:
    """What a state dict calls the weight of this layer."""
    return f"{name}.weight" if name else "weight"


def find_layers(model: nn.Module, is_trained: Callable[[str, nn.Module], bool]) -> dict[str, nn.Module]:
    """Adapted linear layers by their names in the base model; where there are none, linear layers that are trained."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = {name.removeprefix(_PEFT_PREFIX): module for name, module in named_modules(model)}
    found = {n: m for n, m in modules.items() if isinstance(m, FusedBoraLinear) or _is_peft_linear(m)}
    if not found:
        found = {n: m for n, m in modules.items() if _is_linear(m) and is_trained(n, m)}
    if not found:
        raise ValueError("model must have adapted linear layers, or trained ones and their weights in start, got none")
    return found


def _is_peft_linear(module: Any) -> bool:
    """A linear layer with PEFT's LoRA, DoRA or BoRA; told by its parts, so that PEFT need not be installed."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and _is_linear(module.base_layer)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def view(layer: Any, name: str) -> View:
    """A layer that ``find_layers`` found, as it is now. Raises as ``from_start`` does."""
    if isinstance(layer, FusedBoraLinear):
        options = {"scaling": layer.scaling, "norm_order": layer.norm_order}
        seen = View(adapter_parameters(layer), layer._dense_weight, options)
    elif _is_peft_linear(layer):
        seen = _peft_view(layer, name)
    else:
        weight = layer.weight.T if _is_transposed(layer) else layer.weight
        seen = View({"weight": weight}, lambda: weight, {}, _is_transposed(layer))
    if any(hasattr(tensor, "device_mesh") for tensor in seen.parameters.values()):
        raise TypeError(f"{name} must have whole parameters, got sharded ones: call this where they are unsharded")
    return seen


def _peft_view(layer: Any, name: str) -> View:
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1:
        raise ValueError(f"{name} must have one active adapter, got {active}")
    adapter, is_bora = active[0], hasattr(layer, "lora_magnitude_vector_row")
    if not is_bora:
        variant = layer.lora_variant.get(adapter)
        if variant is not None and type(variant).__name__ != "DoraLinearVariant":
            raise ValueError(f"{name} must be LoRA, DoRA or BoRA, got {type(variant).__name__}")
        if layer.merged:
            raise ValueError(f"{name} must not be merged, because W0 is not kept: call unmerge_adapter() first")
    parameters = {"lora_A": layer.lora_A[adapter].weight, "lora_B": layer.lora_B[adapter].weight}
    rows = "lora_magnitude_vector_row" if is_bora else "lora_magnitude_vector"
    for parameter, attribute in (("magnitude_row", rows), ("magnitude_col", "lora_magnitude_vector_col")):
        if adapter in (magnitudes := getattr(layer, attribute, {})):
            parameters[parameter] = magnitudes[adapter].weight
    options = {"scaling": (layer.full_scaling if is_bora else layer.scaling)[adapter]}
    options |= {"norm_order": layer.norm_order[adapter]} if is_bora else {}

    def base() -> Tensor:
        if is_bora:
            return layer._weight()
        stored = quantized.read(layer.base_layer)
        weight = layer.base_layer.weight if stored is None else stored.dense(stored.layout.exact_dtype)
        return weight.T if transposed else weight

    transposed = _is_transposed(layer.base_layer)
    return View(parameters, base, options, transposed)


def check_base_is_start(model: nn.Module) -> None:
    """Refuse base weights that PEFT changed when it made the adapter."""
    for config in getattr(model, "peft_config", {}).values():
        start = getattr(config, "init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            raise ValueError(f"start must hold W0, which init_lora_weights={start!r} changed in the model; got none")
