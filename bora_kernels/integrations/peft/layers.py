"""BoRA layers for PEFT: what PEFT's LoRA layers do, with the magnitudes and the computation of this package."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from ..._private import tensor_of
from ...contract import Adapter, Members, NormOrder
from ...ops import adapted_weight, watch
from ...serving import batches
from . import mixed, through
from .config import STARTS_FROM_BASE, BoraConfig
from .merging import MergingLayer, check_single, keep_unmerged, start_anew


class Magnitude(nn.Module):
    """A trained vector. A module of its own, so that PEFT saves, moves and freezes it like a factor."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))


class BoraLayer(MergingLayer):
    """What BoRA's layers have in common; comes before one of PEFT's LoRA layers among the bases.

    A subclass tells how it sees its weights as matrices (``_matrices``) and what it computes with one adapter instead
    of the base layer's product (``_product``).
    """

    adapter_layer_names = (
        *lora.LoraLayer.adapter_layer_names,
        "lora_magnitude_vector_row",
        "lora_magnitude_vector_col",
    )
    base_layer: Any
    adapter_dtype = torch.float32  # narrower where that was asked for
    place: str | None = None  # its name in the model, for messages
    moved_base = False  # whether the start of an adapter (PiSSA, OLoRA) changed the base weight
    mixed_batches: batches.MixedBatches | None = None  # while the model is called with ``adapter_names``
    own_product = False  # whether the base layer multiplies by its weight in another way than PyTorch's functions
    other_param_names = (*lora.LoraLayer.other_param_names, "norm_order", "detach_norm", "full_scaling")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: BoraConfig, **kwargs) -> None:
        """Add an adapter, or replace the one of that name."""
        if not isinstance(config, BoraConfig):
            raise TypeError(f"config must be a BoraConfig for a layer with BoRA adapters, got {type(config).__name__}")
        if not hasattr(self, "lora_magnitude_vector_row"):  # first called from the constructor of PEFT's layer
            self.lora_magnitude_vector_row, self.lora_magnitude_vector_col = nn.ModuleDict(), nn.ModuleDict()
            self.norm_order: dict[str, NormOrder] = {}
            self.detach_norm: dict[str, bool] = {}
            self.full_scaling: dict[str, float] = {}
            self.base_class = type(self.base_layer)
            watch.watch(self)
            self.register_state_dict_post_hook(keep_unmerged)
            self.register_load_state_dict_post_hook(start_anew)
            self.register_buffer("unmerged_weight", None, persistent=False)  # W0 while the base layer holds W'
        with through.whole(self):  # PEFT puts new parameters where the base layer's weight is
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            self.moved_base |= str(config.init_lora_weights).startswith(STARTS_FROM_BASE)
            self.norm_order[adapter_name], self.detach_norm[adapter_name] = config.norm_order, bool(config.detach_norm)
            self.full_scaling[adapter_name] = self.scaling[adapter_name]
            self._reset_magnitudes(adapter_name, config.members)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def resolve_lora_variant(self, *, config: BoraConfig, **kwargs) -> None:
        """None: what PEFT calls variants are hooks of its own forward."""

    @torch.no_grad()
    def _reset_magnitudes(self, adapter_name: str, members: Members) -> None:
        """Start as the norms of W0 + s·B·A, so that the layer starts as that weight.

        They are float32 over a half-precision base from the start: norms rounded to the base's dtype, as PEFT makes
        new parameters before it widens them, would not cancel those that the forward computes.
        """
        weight, A, B = self._matrices(adapter_name)
        taps, dtype = self._taps(), torch.promote_types(weight.dtype, torch.float32)
        norms: tuple[Tensor | None, ...] = (None, None)
        if "meta" not in (A.device.type, weight.device.type):  # else they are loaded later
            norms = adapted_weight.norms(weight, Adapter(A, B), scaling=self.scaling[adapter_name], taps=taps)
        dicts = self.lora_magnitude_vector_row, self.lora_magnitude_vector_col
        sizes = weight.shape[0], weight.shape[1] // taps
        for magnitudes, size, norm, wanted in zip(dicts, sizes, norms, members, strict=True):
            if adapter_name in magnitudes:
                del magnitudes[adapter_name]
            if wanted:
                magnitudes[adapter_name] = magnitude = Magnitude(size, A.device, dtype)
                if norm is not None:
                    magnitude.weight.copy_(norm)

    def narrow_magnitudes(self, adapter_name: str) -> None:
        """Cast an adapter's magnitudes to the base weight's dtype."""
        for magnitudes in (self.lora_magnitude_vector_row, self.lora_magnitude_vector_col):
            if adapter_name in magnitudes:
                self.adapter_dtype = self.base_layer.weight.dtype
                magnitudes[adapter_name].to(self.adapter_dtype)

    def _magnitudes(self, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
        modules = self._modules  # a module's attributes are slow to look up
        row = modules["lora_magnitude_vector_row"]._modules.get(adapter_name)
        col = modules["lora_magnitude_vector_col"]._modules.get(adapter_name)
        return None if row is None else tensor_of(row, "weight"), None if col is None else tensor_of(col, "weight")

    def _options(self, adapter_name: str) -> dict[str, Any]:
        return {
            "scaling": self.full_scaling[adapter_name],
            "norm_order": self.norm_order[adapter_name],
            "detach_norm": self.detach_norm[adapter_name],
        }

    def _share(self, adapter_name: str) -> float:
        """How much of W' − W0 is applied: 1, but for the scales that PEFT and libraries on it put on LoRA's update.

        They change ``scaling``. s stays, for which magnitudes were trained; W0 + share·(W' − W0) is W0 at 0.
        """
        scaling, full = self.scaling[adapter_name], self.full_scaling[adapter_name]
        return 1.0 if math.isclose(scaling, full, rel_tol=1e-6) else scaling / full

    def _dropout(self, adapter_name: str) -> dict[str, Any]:
        dropout = self._modules["lora_dropout"][adapter_name]
        return {"dropout_p": dropout.p if isinstance(dropout, nn.Dropout) else 0.0, "training": dropout.training}

    def _base_weight(self) -> Tensor:
        """W0 in the base layer's layout, merged or not."""
        return self.base_layer.weight if self.unmerged_weight is None else self.unmerged_weight

    def _matrices(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """W0 as [N, K·taps], lora_A as [R, K·taps] and lora_B as [N, R]: views."""
        raise NotImplementedError

    def _taps(self) -> int:
        """Of each column: 1 but for convolutions."""
        return 1

    def _like_base(self, matrix: Tensor) -> Tensor:
        """A [N, K·taps] in the layout of the base layer's weight."""
        raise NotImplementedError

    def _product(self, x: Tensor, adapter_name: str) -> Tensor:
        raise NotImplementedError

    def _acted_on(self) -> bool:
        return type(self.base_layer) is not self.base_class or through.is_acted_on(self.base_layer)

    def _adapted(self, x: Tensor, adapter_name: str) -> Tensor:
        modules = self._modules
        base = modules["base_layer"]
        factor = modules["lora_B"]._modules.get(adapter_name) or modules["lora_embedding_B"]
        other = modules["lora_A"]._modules.get(adapter_name) or factor
        if type(base) is self.base_class and through.nothing_waits(base, factor, other):
            return self._product(x, adapter_name)
        acted_on = self._acted_on()
        through.look_for_hooks(self, factor, other)
        if not acted_on and "forward" not in factor.__dict__:
            return self._product(x, adapter_name)
        dicts = [modules.get(name) for name in self.adapter_layer_names]
        adapter = [d[adapter_name] for d in dicts if isinstance(d, nn.ModuleDict) and adapter_name in d]
        adapter += [d for d in dicts if isinstance(d, nn.ParameterDict)]
        with through.fetched(*adapter):
            product = functools.partial(self._product, adapter_name=adapter_name)
            return through.call(base, x, product, self.own_product) if acted_on else product(x)

    # --- what PEFT calls ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The active adapter's layer, or the base layer where there is none, where it is disabled or merged."""
        names = kwargs.pop("adapter_names", None) if kwargs else None
        if names is not None:
            mixed.check(self, x, names)
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
        elif names is not None:
            return self._mixed(x, names, *args, **kwargs)
        elif not self.merged_adapters:
            active = self._active_adapter  # the property takes two functions
            for name in [active] if isinstance(active, str) else active:  # at most one, see ``set_adapter``
                if name in self.norm_order:
                    y = self._adapted(x, name)
                    whole = self.scaling[name] == self.full_scaling[name]
                    return y if whole else self._share_of(y, x, name, *args, **kwargs)
        elif self.training:
            watch.note_merged(self)
        return self.base_layer(x, *args, **kwargs)

    def _share_of(self, y: Tensor, x: Tensor, name: str, *args, **kwargs) -> Tensor:
        """The output for x with a share of one adapter, of y, the one with all of it."""
        share = self._share(name)
        return y if share == 1.0 else torch.lerp(self.base_layer(x, *args, **kwargs).to(y.dtype), y, share)

    def _mixed(self, x: Tensor, names: list[str], *args, **kwargs) -> Tensor:
        """The output with an adapter for each entry of x; the base layer's where the layer lacks an adapter."""

        def product(entries: Tensor, name: str) -> Tensor:
            if name not in self.norm_order:
                return self.base_layer(entries, *args, **kwargs)
            return self._share_of(self._adapted(entries, name), entries, name, *args, **kwargs)

        return batches.one_by_one(x, names, product)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one; none with an empty list."""
        check_single("adapter_names", adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module, but for the weight, which transformers sets anew when it ties or resizes embeddings."""
        if name != "weight":
            return super().register_parameter(name, param)
        factors = next(((self.lora_A[n].weight, B.weight) for n, B in self.lora_B.items()), None)
        sizes = None if factors is None else sorted((factors[0].shape[1], factors[1].shape[0]))
        shape = None if param is None else list(param.shape)
        if param is not self.base_layer.weight or (sizes and shape and len(shape) == 2 and sorted(shape) != sizes):
            raise ValueError(
                f"weight of {self.place or type(self).__name__} must stay as it was adapted, of the sizes {sizes}, got "
                f"{shape}: resize and tie embeddings before the model is adapted"
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's conversion takes matrices alone. ``integrations.peft.save_as_lora`` takes all layers."""
        return False

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        watch.watch(self)  # copies, too

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)
