"""Which layers BoRA adapts, and why not the others."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from ...adapters import coverage
from ...adapters.conversion import matches
from ...ops import elsewhere, validation
from ...quantized import read
from .config import STARTS_FROM_BASE, BoraConfig
from .layers import BoraLayer
from .linear import BoraLinear
from .other_layers import BoraConv1d, BoraConv2d, BoraConv3d, BoraEmbedding
from .quantized import BoraQuantizedLinear

_LAYERS = {
    nn.Linear: BoraLinear,
    Conv1D: BoraLinear,
    nn.Embedding: BoraEmbedding,
    nn.Conv1d: BoraConv1d,
    nn.Conv2d: BoraConv2d,
    nn.Conv3d: BoraConv3d,
}


def choose_targets(config: BoraConfig, model: nn.Module) -> None:
    """Make names of "all-linear", without layers that are never called, and look for experts among the targets.

    Raises ValueError for a target that means an expert's weight and no layer; warns of experts that stay as they are.
    """
    experts = coverage.expert_weights(model)
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    if all_linear:
        reasons = coverage.never_called(model)
        left_out = {n: reasons[m] for n, m in model.named_modules() if m in reasons and n in config.target_modules}
        config.target_modules = set(config.target_modules) - left_out.keys()
        coverage.warn_of_left_out(left_out)
        others = coverage.other_weights(model).items()
        coverage.warn_of_other_weights({name: kind for name, kind in others if kind != Conv1D.__name__})
        coverage.warn_of_experts(experts, model)
    elif experts and config.target_modules:
        targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
        layers = [name for name, _ in model.named_modules()]
        without = [target for target in targets if not any(_means(target, name) for name in layers)]
        for target in without:
            if tensor := next((name for name in experts if _means(target, name)), None):
                raise ValueError(
                    f"target_modules must name layers, got {target!r}: {tensor} is a tensor of 3 axes, and experts are "
                    "not adapted"
                )
        if without or any(_means(target, name) for target in targets for name in experts):
            coverage.warn_of_experts(experts, model)


def _means(target: str, name: str) -> bool:
    return matches(target, name) or matches((target,), name)


def layer_class(module: nn.Module, config: BoraConfig, name: str, uncalled: str | None = None) -> type[BoraLayer]:
    """The BoRA layer for a module, which may have BoRA adapters already. ValueError for one that has no such layer.

    ``uncalled`` says why its weight is read and it is never called, where that is so.
    """
    if isinstance(module, BaseTunerLayer) and not isinstance(module, BoraLayer):
        raise ValueError(f"Target module {name} must have BoRA adapters only, got a {type(module).__name__}")
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    kind = next((kind for kind in _LAYERS if isinstance(base, kind)), None)
    quantized = False
    try:
        with elsewhere.gathered(*base.parameters(recurse=False)):
            quantized = kind is nn.Linear and read(base) is not None
            problem = "it is of another type" if kind is None else uncalled or _problem(base, kind, quantized, config)
    except (TypeError, ValueError) as error:  # a weight that cannot be read
        problem = str(error)
    if problem:
        kinds = ", ".join(kind.__name__ for kind in _LAYERS)
        raise ValueError(
            f"Target module {name} ({type(base).__name__}) is not supported: {problem}. BoRA adapts {kinds}; "
            "exclude_modules leaves layers out"
        )
    return BoraQuantizedLinear if quantized else _LAYERS[kind]


def changes_base(config: BoraConfig) -> bool:
    """Whether new adapters start with a change of the base weight."""
    return str(config.init_lora_weights).startswith(STARTS_FROM_BASE)


def _problem(base: Any, kind: type[nn.Module], quantized: bool, config: BoraConfig) -> str | None:
    """What keeps a layer of a known type from being adapted."""
    init = config.init_lora_weights
    if quantized:
        return f"init_lora_weights={init!r} would quantize its weight again" if changes_base(config) else None
    scaled = kind is nn.Embedding and hasattr(base, "embed_scale")
    if getattr(base, "_hf_tp_plan", None) is not None:
        return f"its weight is sharded (tensor parallel plan {base._hf_tp_plan!r})"
    if kind is nn.Linear:
        if problem := coverage.own_forward(base):
            return problem
    elif type(base).forward is not kind.forward and not scaled:
        return f"a {type(base).__name__} computes something else than a {kind.__name__}"
    if is_parametrized(base, "weight") or "weight" not in base._parameters:
        return "its weight is computed from others in each call (weight_norm, spectral_norm or pruning)"
    if base.weight.dtype.itemsize == 1:
        return f"its weight is {base.weight.dtype}; where each call casts it (layerwise casting), adapt the model first"
    if kind in (nn.Linear, Conv1D):
        validation.check_weight(base.weight)
        if kind is Conv1D and init == "olora":
            return "init_lora_weights='olora' works on untransposed weights only"
    elif kind is nn.Embedding:
        if base.max_norm is not None:
            return "max_norm changes the weight in each call"
        if base.scale_grad_by_freq:
            return "scale_grad_by_freq has no meaning for norms, which depend on all tokens"
    elif base.groups != 1:
        return f"groups must be 1, got {base.groups}: lora_A mixes all channels"
    return None
