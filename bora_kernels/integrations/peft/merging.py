"""W' of a layer under PEFT: handed out, as a change of W0, and as the base layer's weight while the layer is merged."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ...contract import Adapter, Options, accumulation_dtype
from ...ops import adapted_weight, loaded_base
from ...rounding import round_weight

if TYPE_CHECKING:
    _PeftLayer = Any  # what comes after it among a layer's bases
else:
    _PeftLayer = object


class MergingLayer(_PeftLayer):
    """What ``BoraLayer`` does with W' but the computation of its forward."""

    def effective_weight(self, adapter_name: str) -> Tensor:
        """W' in the base weight's layout, computed in float32 and rounded once to its dtype, in half precision with
        dither (``rounding.round_weight``); no gradient."""
        weight, A, B = self._matrices(adapter_name)
        return self._effective_weight(weight, A, B, adapter_name)

    def _effective_weight(self, weight: Tensor, A: Tensor, B: Tensor, adapter_name: str) -> Tensor:
        adapter = Adapter(A, B, *self._magnitudes(adapter_name))
        options, share = Options(**self._options(adapter_name)), self._share(adapter_name)
        if share == 1.0:
            return self._like_base(adapted_weight.effective_weight(weight, adapter, options, taps=self._taps()))
        wide = weight.to(accumulation_dtype(weight.dtype))
        merged = torch.lerp(wide, adapted_weight.effective_weight(wide, adapter, options, taps=self._taps()), share)
        return self._like_base(round_weight(merged, weight.dtype))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' − W0, made in float64, in float32 (float64 for a float64 weight) and the base weight's layout."""
        delta = self.delta_matrix(adapter)
        wide = torch.promote_types(self._matrices(adapter)[0].dtype, torch.float32)
        return self._like_base(delta.to(wide))

    def delta_matrix(self, adapter_name: str) -> Tensor:
        """W' − W0 as [N, K·taps] in float64 (float32 on devices without it), times the adapter's share."""
        if adapter_name not in self.norm_order:
            raise ValueError(f"adapter must be one of {', '.join(self.norm_order)}, got {adapter_name!r}")
        weight, A, B = self._matrices(adapter_name)
        adapter, options = Adapter(A, B, *self._magnitudes(adapter_name)), Options(**self._options(adapter_name))
        return adapted_weight.change(weight, adapter, options, taps=self._taps()).mul_(self._share(adapter_name))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the base layer W' as its weight; W0 is kept aside, in memory, and nothing shared with it changes.

        Raises ValueError for more than one adapter, and with ``safe_merge`` for a W' that is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.norm_order]
        if not names:
            return
        check_single("adapter_names", [*self.merged_adapters, *names])
        with torch.inference_mode(False):  # a layer may be merged there, and run where gradients are recorded
            merged = self.effective_weight(names[0])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self._swap_in(merged)
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Give the base layer W0 back, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._swap_out()
        self.merged_adapters.clear()

    def _swap_in(self, merged: Tensor) -> None:
        """Let the base layer compute with W'."""
        base = self.base_layer
        self.unmerged_weight = base.weight.detach()
        self.__dict__["unmerged_parameter"] = _Weakly(base.weight)
        base.weight = nn.Parameter(merged, requires_grad=False)

    def _swap_out(self) -> None:
        """Let the base layer compute with W0 again, by the parameter that it had where another layer is tied to it."""
        weight, parameter = self.unmerged_weight, self.__dict__.pop("unmerged_parameter", _Weakly()).get()
        if parameter is None or (parameter.device, parameter.dtype) != (weight.device, weight.dtype):
            parameter = nn.Parameter(weight, requires_grad=False)
        self.base_layer.weight = parameter
        self.unmerged_weight = None

    def _restore_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Put W0 into a state dict that was made while the base layer holds W'."""
        state[f"{prefix}weight"] = self.unmerged_weight

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        inside = ("base_layer.weight", *(f"lora_B.{n}.weight" for n in self.merged_adapters))
        if self.merged and any(f"{prefix}{name}" in state_dict for name in inside):
            self.unmerge()  # W' would be that of the parameters before
        self._look_at_loaded_base(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _look_at_loaded_base(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Note whose magnitudes are to start anew once the base layer, which comes after, has its weight."""
        if not loaded_base.is_replaced(self._base_weight(), state_dict.get(f"{prefix}base_layer.weight")):
            return
        own = [name for name in state_dict if name.startswith(prefix) and ".lora_" in f".{name[len(prefix) :]}"]
        for adapter_name in self.norm_order:
            if any(adapter_name in name.split(".") for name in own):
                continue
            weight, adapter, scaling = self._started_from(adapter_name)
            if not self.moved_base and loaded_base.is_untrained(weight, adapter, scaling, self._taps()):
                self.__dict__.setdefault("starting_anew", []).append(adapter_name)
            else:
                loaded_base.warn()

    def _started_from(self, adapter_name: str) -> tuple[Tensor, Adapter, float]:
        weight, A, B = self._matrices(adapter_name)
        return weight, Adapter(A, B, *self._magnitudes(adapter_name)), self.full_scaling[adapter_name]


class _Weakly:
    """A parameter as long as another module has it. A copy has none: it would be the original's."""

    def __init__(self, parameter: nn.Parameter | None = None) -> None:
        self.get: Callable[[], nn.Parameter | None] = _nothing if parameter is None else weakref.ref(parameter)

    def __reduce__(self) -> tuple:
        return _Weakly, ()


def _nothing() -> None:
    return None


def keep_unmerged(layer: MergingLayer, state: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    """A state dict holds W0, merged or not: were it W', the adapter would be applied twice when it is loaded."""
    if layer.merged:
        layer._restore_state(state, f"{prefix}base_layer.")


def start_anew(layer: MergingLayer, keys: object) -> None:
    """After a state dict was loaded: magnitudes that were untrained over another weight."""
    for adapter_name in layer.__dict__.pop("starting_anew", ()):
        loaded_base.start_anew(*layer._started_from(adapter_name), layer._taps())


def check_single(argument: str, names: str | list[str] | None) -> None:
    """ValueError for more than one adapter."""
    if names is not None and not isinstance(names, str) and len(names) > 1:
        raise ValueError(
            f"{argument} must name one adapter, got {list(names)}: adapters that normalize the weight do not add up"
        )
