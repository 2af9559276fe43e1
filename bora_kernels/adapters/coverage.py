"""What adapters of layers do not reach: layers whose weight is read without a call, and weights that are no layer's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn
from torch.nn.parameter import is_lazy

# The output projection of torch.nn.MultiheadAttention has a class of its own.
_ATTENTION_OUT_PROJ = nn.modules.linear.NonDynamicallyQuantizableLinear
_CONVOLUTION = nn.modules.conv._ConvNd
_BATCH_NORM = nn.modules.batchnorm._NormBase
_CONV1D = "transformers.pytorch_utils.Conv1D"
_BATCHES = "_batches_when_adapted"  # attribute of a norm
# Children whose weight a module hands to a fused operator or a product of its own, on some devices or on all, by the
# module's class in transformers 5.23 and mamba_ssm.
_READ = {
    "Mamba": ("x_proj", "dt_proj", "out_proj"),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2": ("out_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "TDNNLayer": ("kernel",),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "LongcatFlashTopkRouter": ("classifier",),
}


_LINEAR = ("FalconLinear",)  # subclasses of nn.Linear whose forward is its arithmetic in other words
_LISTED = 5  # names that a warning spells out


def never_called(model: nn.Module) -> dict[nn.Module, str]:
    """Layers on whose weights adapters would have no effect, with the reason: what is around them never calls them."""
    reasons: dict[nn.Module, str] = {}
    for parent in model.modules():
        read = {name for cls in type(parent).__mro__ for name in _READ.get(cls.__name__, ())}
        for name, child in parent.named_children():
            if isinstance(child, _ATTENTION_OUT_PROJ):
                reasons[child] = "MultiheadAttention never calls it"
            elif name in read:
                reasons[child] = f"{type(parent).__name__} reads its weight and may never call it"
    return reasons


def expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of three axes that are no convolution's, by name: experts of mixture models, as ``gate_up_proj``."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in model.named_modules()
        if not isinstance(module, _CONVOLUTION)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and min(parameter.shape) > 1
    }


def other_weights(model: nn.Module) -> dict[str, str]:
    """Weights that attention, recurrent layers and transformers' ``Conv1D`` hold themselves, with their class."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            own = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            held = [key for key in own if module._parameters.get(key) is not None]
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            held = [key for key in module._parameters if key.startswith("weight")]
        else:
            held = ["weight"] if any(f"{c.__module__}.{c.__name__}" == _CONV1D for c in type(module).__mro__) else []
        found |= {f"{name}.{key}" if name else key: type(module).__name__ for key in held}
    return found


def warn_of_other_weights(weights: Mapping[str, str]) -> None:
    """Say which of these "all-linear" does not mean, if there are any."""
    if weights:
        names = ", ".join(list(weights)[:_LISTED]) + (f" and {len(weights) - _LISTED} more" * (len(weights) > _LISTED))
        kinds = ", ".join(dict.fromkeys(weights.values()))
        hint = ". BoraConfig of bora_kernels.integrations.peft adapts Conv1D" * ("Conv1D" in weights.values())
        warnings.warn(f'"all-linear" leaves out {names}: {kinds} holds them, no linear layer{hint}.', stacklevel=4)


def own_forward(linear: nn.Linear) -> str | None:
    """Why a subclass of ``nn.Linear`` is no linear layer with another name, or None where it is."""
    if is_lazy(linear.weight):
        return "its weight is made in its first call: call the model once and adapt it then"
    kind = type(linear)
    if kind.forward is nn.Linear.forward or kind.__name__ in _LINEAR or kind.__module__.startswith("bitsandbytes."):
        return None
    if linear.weight.dtype.itemsize == 1:
        return (
            f"a {kind.__name__} computes in 8 bits; load the model in bfloat16, or quantized by bitsandbytes or torchao"
        )
    if kind.__module__.startswith("torchao.quantization.qat"):
        return f"a {kind.__name__} rounds its weight in each call (quantization-aware training), not the adapted weight"
    return f"a {kind.__name__} has a forward of its own"


def remember_statistics(model: nn.Module) -> None:
    """Note of how many batches the running statistics of norms are, for ``moved_statistics``."""
    for module in model.modules():
        if isinstance(module, _BATCH_NORM) and (batches := _batches(module)) is not None:
            module.__dict__.setdefault(_BATCHES, batches)


def moved_statistics(model: nn.Module) -> list[str]:
    """Names of the running statistics of norms that have changed since the model was adapted."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if _BATCHES in module.__dict__ and _batches(module) != module.__dict__[_BATCHES]
        for name, _ in module.named_buffers(recurse=False)
    ]


def _batches(norm: nn.Module) -> int | None:
    tracked = getattr(norm, "num_batches_tracked", None)
    return None if tracked is None or tracked.is_meta else int(tracked)


def describe_experts(experts: Mapping[str, nn.Parameter], model: nn.Module) -> str:
    """What they are called and how many weights they hold."""
    ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in experts))
    held = sum(parameter.numel() for parameter in experts.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    share = f"{held:,} of the model's {total:,} parameters ({held / total:.0%})"
    return f"{len(experts)} tensors of 3 axes ({ends}) with {share}"


def warn_of_experts(experts: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Say that the experts stay as they are, if there are any."""
    if experts:
        warnings.warn(
            f"Experts are not adapted: {describe_experts(experts, model)}, stay as they are, "
            f"{next(iter(experts))} for one. bora_kernels.explain(model) lists them.",
            stacklevel=4,
        )


def warn_of_left_out(reasons: Mapping[str, str]) -> None:
    """Say which layers "all-linear" leaves out because they are never called, if there are any."""
    if reasons:
        names = ", ".join(list(reasons)[:_LISTED]) + (f" and {len(reasons) - _LISTED} more" * (len(reasons) > _LISTED))
        kinds = "; ".join(dict.fromkeys(reasons.values()))
        warnings.warn(f'"all-linear" leaves out {names}: {kinds}. An adapter would have no effect.', stacklevel=4)


def leave_inference_path(model: nn.Module, adapted: type[nn.Module]) -> None:
    """Turn off the path of ``TransformerEncoderLayer`` that reads weights without calling layers, in inference mode."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _contains(module, adapted):
            module.activation_relu_or_gelu = 0  # read by that path only
        elif isinstance(module, nn.TransformerEncoder) and _contains(module, adapted):
            module.use_nested_tensor = False  # which that path alone can take


def _contains(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(inner, kind) for inner in module.modules())
