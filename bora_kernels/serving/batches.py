"""Batches in which PEFT names an adapter for each input: ``adapter_names`` in a call of a model, or of ``generate``.

While such a call runs, every linear layer has a bank of the adapters of its batch, whose scales are computed once, for
a ``generate`` of many tokens too. ``reuse_scales()`` keeps banks from call to call. Other layers, and linear ones that
are acted on or scaled, run one adapter after the other, each on its entries. No call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef

from ..contract import Adapter, Backend, NormOrder
from ..ops import reuse
from . import cancelled
from .bank import BASE, AdapterBank
from .index import BatchIndex
from .linear import bora_linear_mixed

_MOST_ADAPTERS = 4096  # of a layer at a time


class MixedBatches:
    """What a model's layers share while it is called with ``adapter_names``."""

    def __init__(self) -> None:
        self._banks: WeakKeyDictionary[Any, _LayerBank] = WeakKeyDictionary()
        self._indexes: dict[tuple, BatchIndex] = {}

    def linear(
        self,
        layer: Any,
        x: Tensor,
        names: Sequence[str],
        weight: Tensor,
        bias: Tensor | None,
        present: Collection[str],
        adapter: Callable[[str], tuple[Adapter, float, NormOrder]],
        backend: Backend | None,
    ) -> Tensor:
        """A linear layer's output: ``adapter`` gives what the layer has of a name that is ``present``.

        What has left the layer leaves its bank too, so that adapters may come and go in a scope of ``reuse_scales``.
        """
        cancelled.hear()
        known = self._banks.get(layer)
        if known is None:
            kept = reuse.keep(layer, reuse.state_of((weight,), ()), lambda: _LayerBank(weight))
            known = self._banks[layer] = kept
            known.begin(present)
            cancelled.forget_all_but(layer, present)
        own = tuple(name if name in present else BASE for name in names)
        for name in own:
            if name not in known.checked and name != BASE:
                known.enter(layer, name, *adapter(name))
        bank = known.bank
        key = own, tuple(map(bank.slot, own)), x.device
        if key not in self._indexes:
            self._indexes[key] = bank.index(own)
        return bora_linear_mixed(x, weight, bank, self._indexes[key], bias, backend=backend)


class _LayerBank:
    """A layer's bank, and in which state its adapters entered."""

    def __init__(self, weight: Tensor) -> None:
        self.bank = AdapterBank(weight, _MOST_ADAPTERS)
        self.states: dict[str, tuple | None] = {}
        self.checked: set[str] = set()  # in this call

    def begin(self, present: Collection[str]) -> None:
        """Begin a call of a layer that has these adapters."""
        self.checked.clear()
        for name in self.bank.names:
            if name not in present:
                self.bank.remove(name)
                del self.states[name]

    def enter(self, layer: Any, name: str, adapter: Adapter, scaling: float, norm_order: NormOrder) -> None:
        """Let an adapter enter that has not, or not in this state."""
        tensors, options = tuple(adapter), (scaling, norm_order)
        same = tuple(WeakIdRef(t) for t in tensors if t is not None)  # another adapter may lie where this one lay
        state = reuse.state_of(tensors, options)
        state = None if state is None else state + same
        if state is None or self.states.get(name) != state:
            judged = reuse.state_of((self.bank.weight, *tensors), options) or ()
            judge = cancelled.ask_once(layer, name, judged + same)
            enter = self.bank.replace if name in self.bank else self.bank.add
            enter(name, adapter, scaling=scaling, norm_order=norm_order, judge=judge)
        self.states[name] = state
        self.checked.add(name)


def one_by_one(x: Tensor, names: Sequence[str], product: Callable[[Tensor, str], Tensor]) -> Tensor:
    """The output of ``product(entries of x, name)``, adapter by adapter."""
    parts, order = [], []
    for name in dict.fromkeys(names):
        entries = [entry for entry, other in enumerate(names) if other == name]
        order += entries
        parts.append(product(x[torch.tensor(entries, device=x.device)], name))
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts)[torch.tensor(back, device=x.device)]
