"""Warnings about training: adapted layers that no gradient reaches, and magnitudes in a dtype too narrow for it."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

_LISTED = 5  # layers that a warning spells out
_layers: WeakSet[nn.Module] = WeakSet()
_judged: WeakSet[torch.optim.Optimizer] = WeakSet()  # those whose first step with gradients was looked at
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


def _on_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Before the first step of an optimizer for which there are gradients."""
    if optimizer in _judged:
        return
    if type(optimizer).__name__ == "LoraFAOptimizer" and any(map(_is_magnitude, _parameter_names(optimizer))):
        raise TypeError(
            "optimizer must not be LoraFAOptimizer, which takes trained parameters two by two for lora_A and lora_B: "
            "BoRA has magnitudes beside them"
        )
    stepped = {id(p): p.grad is not None for group in optimizer.param_groups for p in group["params"]}
    if not any(stepped.values()):
        return
    _judged.add(optimizer)
    idle, narrowed, count = [], [], 0
    for layer in _layers:
        trained = [p for p in _adapter(layer) if p.requires_grad and id(p) in stepped]
        if trained:
            count += 1
            idle += [] if any(stepped[id(p)] for p in trained) else [layer]
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
