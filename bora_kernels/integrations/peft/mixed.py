"""What a batch of several adapters may not be in PEFT, and what is left of one; ``serving.batches`` has the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def hooks_end(model: nn.Module) -> Iterator[None]:
    """Where this ends in an error, so do the hooks that hand ``adapter_names`` to layers, which PEFT forgets then.

    The next call would run with the names of the one that failed.
    """
    before = [(module, frozenset(module._forward_pre_hooks)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, known in before:
            for key in module._forward_pre_hooks.keys() - known:
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        raise


def check(layer: Any, x: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError for a batch that the layer cannot serve."""
    place = layer.place or type(layer).__name__
    if len(x) != len(names):
        raise ValueError(
            f"adapter_names must have an entry for each of the {len(x)} inputs of {place}, got {len(names)}"
        )
    if layer.merged:
        raise ValueError(
            f"adapter_names must be None while adapters are merged, as {layer.merged_adapters} are in {place}: call "
            "unmerge_adapter() first"
        )
    if torch.is_grad_enabled():
        trained = [
            name for name, p in layer.named_parameters() if p.requires_grad and set(name.split(".")) & set(names)
        ]
        if x.requires_grad or trained:
            raise ValueError(
                f"adapter_names must be None where a gradient is wanted, as of {[*trained, 'the input'][0]} in "
                f"{place}: mixed batches are for inference; call the model in torch.no_grad()"
            )
