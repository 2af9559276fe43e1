"""``fuse`` and ``unfuse``: whole parts of an adapted model run as one, in place, and one by one again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..modules import FusedBoraLinear
from . import mlp, normed, norms, readers, shared
from .install import has_own_forward, install, installed, uninstall
from .layers import adapted_layer
from .members import is_known, is_peft_lora

Model = TypeVar("Model", bound=nn.Module)
LEFT_OUT = "_left_out_by_fuse"  # attribute of a fused model: names of modules and why each stays as it was


def fuse(model: Model) -> Model:
    """Let parts of an adapted model run as one, in place.

    Call it once, after ``convert`` or ``get_peft_model`` and before the model is compiled or sharded:

        bora_kernels.fuse(model)

    - Gated MLPs, y = down(act(gate(x))⊙up(x)) with SiLU, GELU or tanh-GELU, make what down reads anew in backward.
    - Layers that a forward calls with one input (q, k, v; gate, up) keep it once.
    - RMSNorms, also with Gemma's 1 + w, let these layers keep what the norm reads in place of what it gives.
    - Linear layers of PEFT's own LoRA and DoRA (``LoraConfig``, ``use_dora``) run on this package's kernels, several
      adapters in one batch too (``adapter_names``).

    They are found by what they compute, not by the names of classes.

    Names of modules, parameters and files stay as they are. What the fused parts do not know to do the same is done as
    before: each looks at its layers in every call, so adapters may be added, removed, disabled and merged, hooks set
    and layers replaced at any time. ``print(bora_kernels.explain(model))`` lists what is fused and why the rest is not.

    Args:
        model: a model with layers of ``convert`` or of PEFT.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: before anything changes, for a model without adapters, with merged ones, that is fused,
            compiled or sharded already.
    """
    adapted = _adapted_layers(model)
    layers = set(adapted.values())
    inside = {part for layer in layers for part in layer.modules()}
    left_out: dict[str, str] = {}

    def put(name: str, module: nn.Module, function: Callable, *plan: object) -> None:
        if has_own_forward(module):
            install(module, function, *plan)
        else:
            left_out[name] = "someone else has put another forward into it"

    for name, module in model.named_modules():
        if module in inside:
            if is_peft_lora(module):
                if installed(module) is None:
                    put(name, module, adapted_layer)
            elif type(module).__module__.startswith("peft.") and name in adapted:
                left_out[name] = f"its class, {type(module).__module__}.{type(module).__qualname__}, is not known"
            continue
        if (norm := norms.rms_norm(module)) is not None:
            put(name, module, normed.fused_norm, norm)
        children = {child: layer for child, layer in module._modules.items() if layer in layers}
        if children and (plan := mlp.plan(module)) is not None:
            if isinstance(plan, str):
                left_out[name] = plan
            else:
                put(name, module, mlp.fused_mlp, plan)
        for names in readers.shared_inputs(module):
            found = [children[child] for child in names if child in children]
            found = [layer for layer in found if is_known(layer) and has_own_forward(layer) and not installed(layer)]
            if len(found) > 1:
                group = shared.Group(tuple(found))
                for index, layer in enumerate(found):
                    install(layer, shared.shared_layer, group, index)
    model.__dict__[LEFT_OUT] = left_out
    return model


def unfuse(model: Model) -> Model:
    """Undo ``fuse``: every module has the forward of its class again. Returns the same model.

    Raises:
        TypeError, ValueError: for what is no module, or is not fused.
    """
    _check_module(model)
    fused = [module for module in model.modules() if installed(module) is not None]
    if not fused and not any(LEFT_OUT in module.__dict__ for module in model.modules()):
        raise ValueError("model must be fused, got one that is not: call bora_kernels.fuse(model) first")
    for module in model.modules():
        uninstall(module)
        module.__dict__.pop(LEFT_OUT, None)
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters by name; raises for a model that cannot be fused."""
    _check_module(model)
    for name, module in model.named_modules():
        at = f"in {name}" if name else "as a whole"
        if installed(module) is not None or LEFT_OUT in module.__dict__:
            raise ValueError(f"model must not be fused, got one that is {at}: call bora_kernels.unfuse(model) first")
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"model must not be compiled, got one that is {at}: fuse it first, compile it then")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param"):
            raise ValueError(f"model must not be sharded, got {name} in parts: fuse it first, shard it then")
    adapted: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FusedBoraLinear) or isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
    }
    if not adapted:
        raise ValueError("model must have adapters, got one without: call convert or PEFT's get_peft_model first")
    for name, layer in adapted.items():
        if getattr(layer, "merged", False):
            raise ValueError(f"model must not be merged, got one that is in {name}: unmerge it first")
    return adapted
