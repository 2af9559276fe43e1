"""Batches of several adapters: ``adapter_names`` in a call of a PEFT model, or of its ``generate``.

While such a call runs, every linear layer has a bank of the adapters of its batch (``serving.AdapterBank``), whose
scales are computed once, for a ``generate`` of many tokens too. ``reuse_scales()`` keeps banks from call to call. Other
layers, and linear ones that are acted on or scaled, run one adapter after the other, each on its entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...contract import Adapter, Backend, NormOrder
from ...ops import reuse
from ...serving import BASE, AdapterBank, BatchIndex, bora_linear_mixed

_MOST_ADAPTERS = 4096  # of a layer in a scope of ``reuse_scales``


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
        adapter: Callable[[str], tuple[Adapter, float, NormOrder] | None],
        backend: Backend | None,
    ) -> Tensor:
        """A linear layer's output; ``adapter`` gives what the layer has of a name."""
        known = self._banks.get(layer)
        if known is None:
            kept = reuse.keep(layer, reuse.state_of((weight,), ()), lambda: _LayerBank(weight))
            known = self._banks[layer] = kept
            known.checked.clear()
        for name in names:
            if name not in known.checked and name != BASE:
                known.enter(name, adapter(name))
        bank = known.bank
        slots = tuple(map(bank.slot, names))
        index = self._indexes.get((slots, x.device))
        if index is None or any(bank.slot(name) != slot for name, slot in index.used.items()):
            index = self._indexes[slots, x.device] = bank.index(list(names))
        return bora_linear_mixed(x, weight, bank, index, bias, backend=backend)


class _LayerBank:
    """A layer's bank, and in which state its adapters entered."""

    def __init__(self, weight: Tensor) -> None:
        self.bank = AdapterBank(weight, _MOST_ADAPTERS)
        self.states: dict[str, tuple | None] = {}
        self.checked: set[str] = set()  # in this call

    def enter(self, name: str, found: tuple[Adapter, float, NormOrder] | None) -> None:
        adapter, scaling, norm_order = found or (None, None, "row_col")
        state = () if adapter is None else reuse.state_of(tuple(adapter), (scaling, norm_order))
        if name not in self.bank:
            self.bank.add(name, adapter, scaling=scaling, norm_order=norm_order)
        elif state is None or self.states[name] != state:
            self.bank.replace(name, adapter, scaling=scaling, norm_order=norm_order)
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
