"""Weights that are kept elsewhere between calls, by accelerate or DeepSpeed, and what waits for a layer's call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


def gathered(*tensors: Tensor | None) -> AbstractContextManager:
    """A context in which parameters that DeepSpeed partitioned are whole, to be read; for others nothing."""
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate, or another wrapper of ``forward``, may keep the weight elsewhere between calls."""
    return "forward" in module.__dict__ and getattr(module.__dict__.get("_hf_hook"), "offload", True)


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a layer the hooks of the one whose place it takes; handles of hooks stay good."""
    for name in _HOOKS:
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]
    if "_hf_hook" in old.__dict__:  # accelerate's, which moves inputs to the layer's device
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
