"""PEFT's own LoRA and DoRA layers in a batch of several adapters, which PEFT itself refuses where one is DoRA.

PEFT hands ``adapter_names`` to its layers by a hook, for the time of a call of the model or of its ``generate``. What
is computed of the adapters is kept as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..blocks import Projection
from ..contract import Adapter, NormOrder, given
from ..ops.autograd import adapted_linear
from ..quantized import Quantized
from ..serving.batches import MixedBatches, one_by_one
from .install import must_be_plain
from .members import can_run_on, is_plain, peft_adapter

_calls: WeakKeyDictionary[Any, MixedBatches] = WeakKeyDictionary()  # by the hook of a layer


def output(layer: nn.Module, x: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor | None:
    """The output with an adapter for each entry of x, or None where PEFT's own forward has to answer.

    It answers for LoRA alone where this does not know to do the same, and for what is wrong with DoRA too: another
    number of names than of inputs, merged adapters.

    Raises:
        ValueError: for a DoRA adapter where this does not know to do the same, and where a gradient is wanted.
    """
    attributes: Any = layer
    present = attributes._modules["lora_A"]._modules
    own = [name for name in dict.fromkeys(adapter_names) if name in present]
    if attributes.merged or not isinstance(x, Tensor) or len(x) != len(adapter_names) or not own:
        return None
    if attributes.disable_adapters and not kwargs:
        return attributes.base_layer(x)
    projections = {name: peft_adapter(layer, name) for name in own}
    problem = _problem(x, projections, kwargs)
    if problem is None:
        known = {name: p for name, p in projections.items() if not isinstance(p, str)}
        return _by_one_product(layer, x, adapter_names, known)
    if any(attributes.use_dora.get(name) for name in own):
        raise ValueError(f"adapter_names must be None, or of LoRA adapters alone, where {problem}")
    return None


def _problem(x: Tensor, projections: dict[str, Projection | str], kwargs: dict) -> str | None:
    """Why a layer with these adapters has to be called by PEFT, or None."""
    if kwargs:
        return f"the layer is called with {', '.join(kwargs)}"
    if must_be_plain() or torch.compiler.is_compiling():
        return "the model is traced, compiled or under a transform, or has hooks on all modules"
    for name, projection in projections.items():
        if isinstance(projection, str):
            return f"a layer cannot be read: for {name!r}, {projection}"
        if not is_plain(x, projection):
            return "a layer's input is no plain tensor of its size"
        problem = can_run_on(x, projection)
        if problem is not None:
            return f"a layer cannot run on its input: for {name!r}, {problem}"
        tensors = (x, projection.bias, *given(projection.adapter))
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return f"a gradient is wanted, of {name!r} or the input: call the model in torch.no_grad()"
    return None


def _by_one_product(layer: Any, x: Tensor, names: Sequence[str], projections: dict[str, Projection]) -> Tensor:
    """One read of the weight for all adapters; over a quantized weight, adapter by adapter."""
    first = next(iter(projections.values()))
    if isinstance(first.weight, Quantized):

        def product(entries: Tensor, name: str) -> Tensor:
            if name not in projections:
                return layer.base_layer(entries)
            weight, bias, adapter, options, _ = projections[name]
            return adapted_linear(entries, weight, given(adapter), bias, options)

        return one_by_one(x, names, product)

    def adapter(name: str) -> tuple[Adapter, float, NormOrder]:
        return given(projections[name].adapter), projections[name].options.scaling, "row_col"

    present = layer._modules["lora_A"]._modules
    with torch.no_grad():
        return _batches(layer, names).linear(layer, x, names, first.weight, first.bias, present, adapter, None)


def _batches(layer: nn.Module, names: Sequence[str]) -> MixedBatches:
    """What is kept while PEFT hands over these names: it lives as long as the hook that does."""
    for hook in layer._forward_pre_hooks.values():
        if getattr(hook, "keywords", {}).get("adapter_names") is names:
            return _calls.setdefault(hook, MixedBatches())
    return MixedBatches()
