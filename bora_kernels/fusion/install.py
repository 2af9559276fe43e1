"""Putting another forward into a module and taking it out again, and who else may have done so.

``module.forward = functools.partial(function, module, *plan)`` survives copies and ``torch.save`` with the copy's own
module in it, and changes no name in a state dict. accelerate's hooks do the same, with what was there before in
``_old_forward``: under such a hook that is the place.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad

from .. import _private
from ..ops import elsewhere, transforms

_PLACES = ("_old_forward", "forward")
_REPLICATE = "_replicate_for_data_parallel"


class Part(NamedTuple):
    """A kind of fused part: what it is called, and why a module with this plan runs plainly now, or None."""

    kind: str
    problem: Callable[..., str | None]


def fused_forward(kind: str, problem: Callable[..., str | None]) -> Callable[[Callable], Callable]:
    """Mark ``function(module, *plan, *args, **kwargs)`` as one that ``install`` may put in a forward's place.

    ``problem(module, *plan)`` says why the module would run its plain forward now.
    """

    def mark(function: Callable) -> Callable:
        function.part = Part(kind, problem)  # type: ignore[attr-defined]
        return function

    return mark


def is_fused(forward: Any) -> bool:
    """Whether this is a forward that ``install`` made."""
    return type(forward) is functools.partial and hasattr(forward.func, "part")


def installed(module: nn.Module) -> functools.partial | None:
    """The forward that ``install`` put into this module."""
    forwards = (module.__dict__.get(place) for place in _PLACES)
    return next((forward for forward in forwards if is_fused(forward)), None)


def install(module: nn.Module, function: Callable, *plan: object) -> None:
    """Let ``function(module, *plan, *args, **kwargs)`` be the module's forward."""
    place = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    module.__dict__[place] = functools.partial(function, module, *plan)
    module.__dict__[_REPLICATE] = functools.partial(_replicate, module)


def _replicate(module: nn.Module) -> nn.Module:
    """A copy for ``nn.DataParallel``, which takes attributes over as they are, ``forward`` with this module too."""
    replica = getattr(type(module), _REPLICATE)(module)
    uninstall(replica)
    return replica


def uninstall(module: nn.Module) -> None:
    """Give a module the forward of its class back."""
    if installed(module) is not None:
        module.__dict__.pop(_REPLICATE, None)
    if is_fused(module.__dict__.get("forward")):
        del module.__dict__["forward"]
    if is_fused(module.__dict__.get("_old_forward")):
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, which calls its children."""
    return type(module).forward(module, *args, **kwargs)


def has_own_forward(module: nn.Module) -> bool:
    """Whether nothing but ``install`` and accelerate's hooks that keep weights in place have changed the forward."""
    attributes = module.__dict__
    forward = attributes.get("forward")
    if "_hf_hook" in attributes and not elsewhere.is_offloaded(module):
        forward = attributes.get("_old_forward")
    if forward is None or is_fused(forward):
        return True
    # what accelerate leaves behind where its hook was removed
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


def is_waited_for(module: nn.Module) -> bool:
    """Whether something would miss the call of this module: hooks, or a forward that someone else put there."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    return "forward" in own and not has_own_forward(module)


def is_any_waited_for(module: nn.Module) -> bool:
    """The same of a module and all inside it."""
    return is_waited_for(module) or any(is_any_waited_for(m) for m in module._modules.values() if m is not None)


def must_be_plain() -> bool:
    """Whether modules are to be called one by one: hooks on all modules, a tracer or a transform around the call."""
    if _private.has_global_hooks():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or transforms.transforming() or getattr(forward_ad, "_current_level", -1) >= 0
