"""Layers that read one input, as one function: x is read once for all of them.

The layer that is called first computes what all of them give, and the others take theirs if they are called with the
same x, unchanged and under the same circumstances; else each computes its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import Projection, shared_input
from . import normed
from .install import fused_forward, must_be_plain, plain
from .layers import adapted_layer
from .members import can_run_on, is_peft_lora, is_plain, read, single_only


class Ready(NamedTuple):
    """What was computed for layers that are still to be called."""

    x: Tensor
    state: tuple
    outputs: dict[int, Tensor]
    members: list[Projection]
    moments: list[tuple]  # of each layer


class Group:
    """Layers that a module calls with one input one after the other, and what is ready for those still to come."""

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        self.layers = layers
        self.ready: Ready | None = None  # put there and read as one, since threads may share a model

    def __getstate__(self) -> tuple[nn.Module, ...]:
        return self.layers  # a copy begins with nothing ready

    def __setstate__(self, layers: tuple[nn.Module, ...]) -> None:
        self.layers, self.ready = layers, None

    def members(self) -> list[Projection] | str:
        """What the layers compute now, or why each has to be asked."""
        members = []
        for layer in self.layers:
            projection = read(layer)
            if isinstance(projection, str):
                return projection
            if problem := single_only(projection):
                return problem
            members.append(projection)
        return members

    def take(self, index: int, x: object) -> Tensor | None:
        """What is ready for this layer."""
        ready = self.ready
        if ready is None or ready.x is not x or index not in ready.outputs or ready.state != _state(ready.x):
            return None
        if ready.moments[index] != _moment(self.layers[index], ready.members[index]):
            return None
        y = ready.outputs.pop(index)
        if not ready.outputs:
            self.ready = None
        return y

    def compute(self, index: int, x: Tensor) -> Tensor | None:
        """What this layer gives, with the others' made ready; or None where it has to compute alone."""
        self.ready = None
        if not torch.compiler.is_compiling() and x.is_inference():  # which has no version that would tell of a change
            return None
        members = self.members()
        if isinstance(members, str) or not all(can_run_on(x, projection) is None for projection in members):
            return None
        outputs = dict(enumerate(shared_input(x, members, normed.origin(x))))
        y = outputs.pop(index)
        moments = [_moment(layer, projection) for layer, projection in zip(self.layers, members, strict=True)]
        self.ready = Ready(x, _state(x), outputs, members, moments)
        return y


def _state(x: Tensor) -> tuple:
    """The circumstances of a call that an output depends on besides the layers."""
    version = 0 if torch.compiler.is_compiling() else x._version
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return version, torch.is_grad_enabled(), autocast


def _moment(layer: Any, projection: Projection) -> tuple:
    """What tells that an adapter was changed or switched since: an output that nobody took may be asked for later."""
    if torch.compiler.is_compiling():
        return ()
    own, adapter = layer.__dict__, projection.adapter
    scaling = own.get("scaling")
    return (
        own.get("_disable_adapters"),
        own.get("_active_adapter"),
        tuple(scaling.values()) if type(scaling) is dict else scaling,
        *[0 if t is None or t.is_inference() else t._version for t in adapter or ()],
    )


def _problem(layer: nn.Module, group: Group, index: int) -> str | None:
    members = group.members()
    return members if isinstance(members, str) else None


@fused_forward("layer that reads its input with others", _problem)
def shared_layer(layer: nn.Module, group: Group, index: int, *args: Any, **kwargs: Any) -> Any:
    """The layer's forward as one of a group; alone where that is not possible."""
    if len(args) == 1 and not kwargs and not must_be_plain():
        x = args[0]
        y = group.take(index, x)
        if y is None and is_plain(x, read(layer)):
            y = group.compute(index, x)
        if y is not None:
            return y
    group.ready = None
    return adapted_layer(layer, *args, **kwargs) if is_peft_lora(layer) else plain(layer, *args, **kwargs)
