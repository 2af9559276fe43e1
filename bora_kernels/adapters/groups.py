"""Groups of trained parameters for optimizers."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, lr: float, *, lora_B: float = 1.0, magnitudes: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trained parameters of an adapted model, in groups with a learning rate of their own, for any optimizer.

        torch.optim.AdamW(bora_kernels.parameter_groups(model, lr=1e-4, lora_B=16))

    Args:
        model: adapted by ``convert`` or by PEFT (BoRA, DoRA or LoRA).
        lr: of the factors A and of what else is trained.
        lora_B: what lr is multiplied by for the factors B, as in LoRA+ (arXiv 2402.12354).
        magnitudes: the same for the magnitudes. Other recipes of LoRA+ take every vector for a B.
        weight_decay: of all but the magnitudes, which decay would pull towards zero, away from the weight's norms.

    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay`` and ``name``: "lora_A", "lora_B", "magnitudes", "others";
        those that have parameters.

    Raises:
        ValueError: for a rate that is negative or not finite, or a model without trained parameters.
    """
    for name, value in {"lr": lr, "lora_B": lora_B, "magnitudes": magnitudes, "weight_decay": weight_decay}.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    groups = {
        "lora_A": (lr, weight_decay),
        "lora_B": (lr * lora_B, weight_decay),
        "magnitudes": (lr * magnitudes, 0.0),
        "others": (lr, weight_decay),
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group(name)].append(parameter)
    if not any(members.values()):
        raise ValueError(
            f"model must have parameters that require a gradient, got a {type(model).__name__} without any"
        )
    return [
        {"name": name, "params": members[name], "lr": rate, "weight_decay": decay}
        for name, (rate, decay) in groups.items()
        if members[name]
    ]


def _group(name: str) -> str:
    for part in reversed(name.split(".")):
        if part.startswith(("magnitude_", "lora_magnitude_")):
            return "magnitudes"
        if part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            return f"lora_{part[-1]}"
    return "others"
