"""Adapted layers whose base layer is acted on: hooks, offloading, layerwise casting, a sharding engine.

An adapted layer reads the base layer's weight and does not call the base layer. Where something waits for that call, to
fetch the weight or to see inputs and outputs, the layer makes it, and its own computation takes the place of the one
product that the base layer makes with its weight. So hooks see the input and the adapted output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...ops import elsewhere
from ...ops.validation import USE_FSDP2

# The functions that base layers multiply by their weight with, and the places of the input and of the weight.
_PRODUCTS: dict[Callable, tuple[int, int]] = {
    F.linear: (0, 1),
    F.embedding: (0, 1),
    F.conv1d: (0, 1),
    F.conv2d: (0, 1),
    F.conv3d: (0, 1),
    torch.addmm: (1, 2),  # transformers' Conv1D
}


def nothing_waits(base: nn.Module, *factors: nn.Module) -> bool:
    """Whether nothing at all waits for a call of these, as is so in most steps, asked in little of the host's time.

    Where something may, ``is_acted_on`` and ``look_for_hooks`` tell what.
    """
    if "forward" in base.__dict__ or _is_hooked(base):
        return False
    for factor in factors:
        if "forward" in factor.__dict__ or factor._forward_hooks or factor._forward_pre_hooks:
            return False
        if "_fsdp_wrapped_module" in factor._modules:
            return False
    return True


def is_acted_on(base: nn.Module) -> bool:
    """Whether something waits for the call of this layer. Moving inputs to its device, as accelerate does, is none."""
    return _is_hooked(base) or elsewhere.is_offloaded(base)


def _is_hooked(base: nn.Module) -> bool:
    return bool(base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)


def look_for_hooks(layer: Any, *factors: nn.Module) -> None:
    """Warn, once, where a hook waits for the call of a factor, which the layer reads and does not call.

    Raises ValueError where FSDP1 waits for it, which would have to gather it.
    """
    for factor in factors:
        if factor._forward_hooks or factor._forward_pre_hooks:
            _warn_of_hooks(layer.place or type(layer).__name__)
        if "_fsdp_wrapped_module" in factor._modules:
            raise ValueError(
                f"lora_A and lora_B of {layer.place or type(layer).__name__} must not be units of "
                "FullyShardedDataParallel (fsdp_auto_wrap_policy of PEFT makes them so), since the layer reads "
                f"them and never calls them: {USE_FSDP2}"
            )


_warned_of_hooks: set[str] = set()


def _warn_of_hooks(place: str) -> None:
    if not _warned_of_hooks:
        _warned_of_hooks.add(place)
        warnings.warn(
            f"hooks on lora_A or lora_B of {place} are not called: the layer reads their weights in one function. "
            "Hooks on the layer itself, on its base_layer and on its parameters are.",
            stacklevel=5,
        )


def call(base: Any, x: Tensor, product: Callable[[Tensor], Tensor], own_product: bool = False) -> Tensor:
    """The base layer's call with ``product(x)`` in the place of its product, or with ``own_product`` of its forward.

    Raises ValueError where the base layer makes no product that this could be, or with another weight than its own.
    """
    if own_product and elsewhere.is_offloaded(base):
        raise ValueError(f"base_layer must hold its weight, got a quantized {type(base).__name__} that is offloaded")
    if own_product or hasattr(base.weight, "ds_id"):  # DeepSpeed has functions of its own in the place of PyTorch's
        forward = base.__dict__.get("forward")
        base.forward = product
        try:
            return base(x)
        finally:
            if forward is None:
                del base.forward
            else:
                base.forward = forward
    with _InPlaceOfTheProduct(base, product) as mode:
        y = base(x)
    if not mode.made:
        raise ValueError(
            f"base_layer must multiply by its weight as a linear layer, an embedding or a convolution does, got a "
            f"{type(base).__name__} that does not (changed after the model was adapted?)"
        )
    return y


class _InPlaceOfTheProduct(TorchFunctionMode):
    def __init__(self, base: nn.Module, product: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.base, self.product, self.made = base, product, False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        places = _PRODUCTS.get(func)
        if places is None or self.made:
            return func(*args, **(kwargs or {}))
        if args[places[1]] is not self.base.weight:
            raise ValueError(
                f"base_layer must multiply by its weight as it is, got a {type(self.base).__name__} that changes it: "
                "quantization-aware training would round W0 and not the adapted weight; leave adapted layers out of it"
            )
        self.made = True
        return self.product(args[places[0]])


@contextmanager
def fetched(*modules: nn.Module) -> Iterator[None]:
    """Modules that are read and not called, with their weights where accelerate's hooks put them for a call."""
    offloaded = [m for m in modules if "_hf_hook" in m.__dict__ and elsewhere.is_offloaded(m)]
    for module in offloaded:
        module.__dict__["_hf_hook"].pre_forward(module)
    try:
        yield
    finally:
        for module in offloaded:
            module.__dict__["_hf_hook"].post_forward(module, torch.empty(0))


@contextmanager
def whole(layer: Any) -> Iterator[None]:
    """The base layer's weight as a whole: fetched from where accelerate or DeepSpeed keep it."""
    with elsewhere.gathered(*layer.parameters()), fetched(layer.base_layer):
        yield
