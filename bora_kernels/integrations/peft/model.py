"""``BoraModel``: PEFT's ``LoraModel`` with BoRA's layers, and refusals of what cannot be right."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...adapters import coverage, unquantized
from ...adapters.conversion import leave_no_trace
from ...adapters.files import present_name
from ...modules import FusedBoraLinear
from ...serving.batches import MixedBatches
from . import mixed, through
from .config import BoraConfig
from .layers import BoraLayer
from .merging import check_single
from .quantized import BoraQuantizedLinear
from .targets import changes_base, choose_targets, layer_class


class BoraModel(LoraModel):
    """A model with BoRA adapters; ``peft.get_peft_model`` with a ``BoraConfig`` makes it.

    Raises:
        ValueError: for a target that has no BoRA layer, or several active adapters at once; before anything changes.
        NotImplementedError: for sums of adapters (``add_weighted_adapter``) and conversions to LoRA.
    """

    tuner_layer_cls = BoraLayer

    def _prepare_model(self, peft_config: BoraConfig, model: nn.Module) -> None:
        """What PEFT calls before it replaces the first module: the place to refuse the whole."""
        if getattr(peft_config, "target_modules_to_tie", None):
            names = sorted(peft_config.target_modules_to_tie)
            raise ValueError(
                f"ensure_weight_tying cannot tie the adapters of {names} to the embedding's: BoRA normalizes rows and "
                "columns in an order, which a transposed weight turns around"
            )
        if converted := next((name for name, m in model.named_modules() if isinstance(m, FusedBoraLinear)), None):
            raise ValueError(
                f"model must have no layers of bora_kernels.convert, got one as {converted}: merge them first"
            )
        choose_targets(peft_config, model)
        uncalled = coverage.never_called(model)
        inside: tuple[str, ...] = ()  # of layers that have adapters already
        for name, module in model.named_modules():
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
            if self._check_target_module_exists(peft_config, name):
                layer_class(module, peft_config, name, uncalled.get(module))
                if getattr(module, "merged", False) and changes_base(peft_config):
                    raise ValueError(
                        f"init_lora_weights={peft_config.init_lora_weights!r} changes base weights, and {name} is "
                        "merged: call unmerge_adapter first"
                    )
        super()._prepare_model(peft_config, model)

    def inject_adapter(self, model: nn.Module, *args, **kwargs) -> None:
        """Adapt a model's layers, in every place where one stands."""
        super().inject_adapter(model, *args, **kwargs)
        layers = {m.get_base_layer(): m for m in model.modules() if isinstance(m, BoraLayer)}
        for parent, name, child in list(_children(model)):
            if child in layers and not isinstance(parent, BoraLayer):
                setattr(parent, name, layers[child])
        coverage.leave_inference_path(model, BoraLayer)

    @staticmethod
    def _create_new_module(lora_config: BoraConfig, adapter_name: str, target: nn.Module, **kwargs) -> BoraLayer:
        name = kwargs.get("target_name", "")
        layer = layer_class(target, lora_config, name)(target, adapter_name, config=lora_config, **kwargs)
        layer.place = name
        return layer

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """With ``adapter_names`` every input of the batch runs with its own adapter; for inference only."""
        if kwargs.get("adapter_names") is None:
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, BoraLayer)]
        with mixed.hooks_end(self), super()._enable_peft_forward_hooks(*args, **kwargs):
            batches = MixedBatches()
            for layer in layers:
                layer.mixed_batches = batches
            try:
                yield
            finally:
                for layer in layers:
                    layer.mixed_batches = None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As in PEFT, which moves adapters to where the base layer's weight is: for a call, not between calls."""
        with through.whole(new_module) if isinstance(new_module, BoraLayer) else nullcontext():
            super()._replace_module(parent, child_name, new_module, child)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one."""
        check_single("adapter_name", adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # the factors have the base's dtype then
            for module in self.modules():
                if isinstance(module, BoraLayer):
                    module.narrow_magnitudes(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Let the base layers run on the merged weights until ``unmerge_adapter``, which restores them to the bit."""
        check_single("adapter_names", adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, *args, adapter_names: list[str] | None = None, **kwargs) -> nn.Module:
        check_single("adapter_names", adapter_names)
        layers = [child for child in _children(self.model) if isinstance(child[2], BoraLayer)]
        quantized = [layer for _, _, layer in layers if isinstance(layer, BoraQuantizedLinear)]
        for layer in quantized:
            layer.merged_dtype = unquantized.running_dtype(self.model)
        model = super()._unload_and_optionally_merge(*args, adapter_names=adapter_names, **kwargs)
        for parent, name, child in layers:  # PEFT knows the first place of each
            if getattr(parent, name) is child:
                setattr(parent, name, child.get_base_layer())
        if any(layer.merged for layer in quantized):
            unquantized.unmark(model)
        leave_no_trace(model)
        return model

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """Refused: a weighted sum of normalized weights is not of BoRA's form."""
        raise NotImplementedError(
            "add_weighted_adapter is not defined for BoRA: a sum of adapters, each normalized, is not a BoRA adapter"
        )

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: BoraConfig, adapter_name: str, state_dict: dict[str, Tensor], **kwargs
    ) -> dict[str, Tensor]:
        """The adapter's tensors; of a model of diffusers with names of magnitudes that its LoRA loaders refuse.

        They take every file for LoRA or DoRA and drop magnitudes with no more than a line in the log.
        """
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, **kwargs)
        parts = [name for name, t in tensors.items() if ".lora_" in name and t.numel() == 0]
        if parts:
            warnings.warn(
                f"{len(parts)} tensors of the adapter are empty, {parts[0]} for one: gather sharded parameters first, "
                "and hand the state dict of the whole model to save_pretrained(state_dict=...)",
                stacklevel=3,
            )
        for module in model.modules():
            for option in ("norm_order", "detach_norm") if isinstance(module, BoraLayer) else ():
                own = getattr(module, option).get(adapter_name, getattr(config, option))
                if own != getattr(config, option):
                    raise ValueError(
                        f"{option} of {module.place} must be as in the configuration that is saved, "
                        f"{getattr(config, option)!r}, got {own!r}"
                    )
        if any(kind.__module__.partition(".")[0] == "diffusers" for kind in type(model).__mro__):
            return {name.replace(".lora_magnitude_", ".bora_magnitude_"): t for name, t in tensors.items()}
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Reads magnitudes by the names of earlier versions and of PEFT's DoRA, whose is the row magnitude."""
        expert = next((name for name in state_dict if re.search(r"\.experts\.\d+\.", name)), None)
        if expert is not None and coverage.expert_weights(model):
            raise ValueError(
                f"the adapter must fit the model, got {expert}: experts were layers in transformers 4 and are tensors "
                "of 3 axes in this model, which BoRA does not adapt"
            )
        renamed = {}
        for name, tensor in state_dict.items():
            present = present_name(name)
            renamed[present] = tensor if present == name else tensor.flatten()
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args, **kwargs) -> dict:
        raise NotImplementedError(
            "path_initial_model_for_weight_conversion is not supported with BoRA: its adapters are not additive"
        )


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Every place in a model: the module around it, its name there, and what stands in it."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            yield parent, name, child
