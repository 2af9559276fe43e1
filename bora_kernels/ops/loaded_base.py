"""A base weight that is loaded under an adapter without it, as with ``load_state_dict(base, strict=False)``.

Magnitudes start as the norms of V, so that a layer starts as W0. Those of another weight would scale the loaded one.
Where they are what they started as, they start anew; trained ones are left as they are, with a warning.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..contract import Adapter
from . import adapted_weight


def is_replaced(weight: Any, loaded: Any) -> bool:
    """Whether ``loaded`` is going to be another weight in the place of this one."""
    tensors = (weight, loaded)
    if not all(isinstance(t, Tensor) and t.is_floating_point() and not t.is_meta for t in tensors):
        return False
    if any(hasattr(t, "placements") for t in tensors):  # sharded: it comes with all the rest
        return False
    return weight.shape == loaded.shape and not torch.equal(weight, loaded.to(weight))


@torch.no_grad()
def is_untrained(weight: Tensor, adapter: Adapter, scaling: float, taps: int = 1) -> bool:
    """Whether the magnitudes are the norms of V."""
    if any(t is not None and t.is_meta for t in adapter):
        return False
    norms = adapted_weight.norms(weight, adapter, scaling=scaling, taps=taps)
    pairs = [(m, norm) for m, norm in zip(adapter[2:], norms, strict=True) if m is not None]
    return all(torch.allclose(m, norm.to(m.dtype), rtol=8 * torch.finfo(m.dtype).eps) for m, norm in pairs)


@torch.no_grad()
def start_anew(weight: Tensor, adapter: Adapter, scaling: float, taps: int = 1) -> None:
    """Give the magnitudes the norms of V."""
    norms = adapted_weight.norms(weight, adapter, scaling=scaling, taps=taps)
    for magnitude, norm in zip(adapter[2:], norms, strict=True):
        if magnitude is not None:
            magnitude.copy_(norm)


def warn() -> None:
    """Of trained magnitudes over a weight that is loaded without them."""
    warnings.warn(
        "a base weight was loaded into an adapted layer without its adapter, whose magnitudes belong to the weight "
        "that was there before unless they were loaded for this one: load the adapter with it, or adapt the model "
        "after its weights are loaded, or start the adapter anew (reset_parameters() of a converted layer)",
        stacklevel=2,
    )
