"""Warnings about training: layers that no gradient reaches or no optimizer has, magnitudes too narrow or decayed."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

_LISTED = 5  # layers that a warning spells out
_USUAL_DECAY = 0.01  # what torch.optim.AdamW has unless it is told otherwise
_layers: WeakSet[nn.Module] = WeakSet()
_judged: WeakSet[torch.optim.Optimizer] = WeakSet()  # those whose first step with gradients was looked at
_doubted: WeakSet[torch.optim.Optimizer] = WeakSet()  # those that hold layers without their adapters
_served: WeakSet[nn.Module] = WeakSet()  # layers whose adapters were in an optimizer that stepped
_merged: WeakSet[nn.Module] = WeakSet()  # layers that were called in training while they were merged
_said: set[str] = set()
_hook: Any = None


def watch(layer: nn.Module) -> None:
    """Have an adapted layer looked at when an optimizer steps its parameters for the first time.

    Its parameters whose names begin with ``lora_`` or ``magnitude_`` are the adapter, ``layer.adapter_dtype`` is the
    dtype that was chosen for magnitudes, and ``layer.place``, where there is one, its name in the model.
    """
    global _hook
    if _hook is None:  # costs a step of any optimizer a look into a set
        _hook = register_optimizer_step_pre_hook(_on_step)
    _layers.add(layer)


def warn_of_narrow_magnitudes(*magnitudes: Tensor | None) -> None:
    """Warn, once, where one of these is narrower than float32 though its layer was not made so."""
    if "narrow" in _said or all(m is None or m.dtype.itemsize >= 4 for m in magnitudes):
        return
    for layer in _layers:
        if any(p is m for p in _adapter(layer, "magnitude") for m in magnitudes) and _is_narrowed(layer):
            return _warn_of_narrowed([layer])


def note_merged(layer: nn.Module) -> None:
    """Note that a merged layer is called in training mode, for the next step of an optimizer that has its adapter."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _merged.add(layer)


def _on_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Before the first step of an optimizer for which there are gradients; merged layers at any step."""
    if _merged:
        _warn_of_merged(optimizer)
    if optimizer in _judged:
        return
    if type(optimizer).__name__ == "LoraFAOptimizer" and any(map(_is_magnitude, _parameter_names(optimizer))):
        raise TypeError(
            "optimizer must not be LoraFAOptimizer, which takes trained parameters two by two for lora_A and lora_B: "
            "BoRA has magnitudes beside them"
        )
    stepped = {id(p): p.grad is not None for group in optimizer.param_groups for p in group["params"]}
    lacking = [layer for layer in _layers if _is_lacking(layer, stepped)]
    if lacking and optimizer not in _doubted:
        _doubted.add(optimizer)  # another optimizer may have the adapters
        return
    if lacking := [layer for layer in lacking if layer not in _served]:
        _judged.add(optimizer)
        warnings.warn(
            f"an optimizer holds weights of {_names(lacking)}, which are frozen, and no optimizer that stepped holds "
            "their adapters, which do not learn: make the optimizer after the model was adapted",
            stacklevel=4,
        )
    if not any(stepped.values()):
        return
    _judged.add(optimizer)
    _warn_of_decay(optimizer)
    idle, narrowed, count = [], [], 0
    for layer in _layers:
        trained = [p for p in _adapter(layer) if p.requires_grad and id(p) in stepped]
        if trained:
            _served.add(layer)
            count += 1
            idle += [] if any(stepped[id(p)] for p in trained) or getattr(layer, "merged", False) else [layer]
            narrowed += [layer] if any(id(p) in stepped for p in _adapter(layer, "magnitude")) else []
    narrowed = [layer for layer in narrowed if _is_narrowed(layer)]
    if narrowed and "narrow" not in _said:
        _warn_of_narrowed(narrowed)
    if idle:
        warnings.warn(
            f"{len(idle)} of {count} adapted layers took no part in this training step, no gradient reached their "
            f"adapters: {_names(idle)}. Where other code reads a layer's weight and never calls the layer (a fused "
            "kernel, a loss that takes the head's weight), an adapter has no effect: leave it out of the targets, or "
            "turn that code off. Layers that only some batches use, such as experts, are no problem.",
            stacklevel=4,
        )


def _warn_of_merged(optimizer: torch.optim.Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    layers = [m for m in _merged if getattr(m, "merged", False) and any(id(p) in held for p in _adapter(m))]
    _merged.clear()
    if layers and "merged" not in _said:
        _said.add("merged")
        warnings.warn(
            f"{_names(layers)} were called in training while they are merged: their adapters get no gradient and do "
            "not learn until they are unmerged (unmerge() of the layers, or PEFT's unmerge_adapter())",
            stacklevel=5,
        )


def _is_lacking(layer: nn.Module, stepped: dict[int, bool]) -> bool:
    """Whether an optimizer has weights of a layer, and none of its adapter's, which is trained."""
    own = {id(p): p.requires_grad for p in _adapter(layer)}
    if not any(own.values()) or not stepped.keys().isdisjoint(own):
        return False
    return any(id(p) in stepped and not p.requires_grad for p in layer.parameters())


def _warn_of_decay(optimizer: torch.optim.Optimizer) -> None:
    magnitudes = {id(p) for layer in _layers for p in _adapter(layer, "magnitude")}
    decays = [
        group["weight_decay"]
        for group in optimizer.param_groups
        if not isinstance(decay := group.get("weight_decay", 0.0), Tensor)
        and decay > _USUAL_DECAY
        and any(id(p) in magnitudes for p in group["params"])
    ]
    if decays:
        warnings.warn(
            f"weight decay of {max(decays)} pulls magnitudes towards zero, and with them the adapted weights: "
            "give them a group without it, as bora_kernels.parameter_groups(model, lr, weight_decay=...) does",
            stacklevel=5,
        )


def _parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group.get("names", ())]


def _is_magnitude(name: str) -> bool:
    return ".lora_magnitude_vector_" in name


def _adapter(layer: nn.Module, kind: str = "") -> list[nn.Parameter]:
    """The parameters of a layer's adapters, or its magnitudes alone."""
    return [p for n, p in layer.named_parameters() if n.startswith(("lora_", "magnitude_")) and kind in n]


def _is_narrowed(layer: Any) -> bool:
    """Whether a magnitude is narrower than float32 and than what was chosen."""
    chosen = min(4, layer.adapter_dtype.itemsize)
    return any(p.dtype.itemsize < chosen for p in _adapter(layer, "magnitude"))


def _warn_of_narrowed(layers: list[nn.Module]) -> None:
    _said.add("narrow")
    dtype = min((p.dtype for p in _adapter(layers[0], "magnitude")), key=lambda dtype: dtype.itemsize)
    warnings.warn(
        f"The magnitudes of {_names(layers)} are {dtype}: changes of less than about {torch.finfo(dtype).eps:.1g} of a "
        "magnitude are lost, which are most that training makes. They started wider; model.to(dtype), half(), a "
        "trainer's cast of all trained parameters or FSDP's param_dtype makes them so. Convert the model before it is "
        "adapted, or bring them back: for name, p in model.named_parameters(): if 'magnitude' in name: p.data = "
        "p.data.float(). adapter_dtype of convert, or autocast_adapter_dtype=False of PEFT, chooses such a dtype "
        "without this warning.",
        stacklevel=4,
    )


def _names(layers: list[nn.Module]) -> str:
    names = sorted(getattr(layer, "place", None) or type(layer).__name__ for layer in layers)
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
