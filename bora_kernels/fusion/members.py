"""What a layer computes, read off the layer at each call: its weight, adapter and options, or why it has to be called.

    y = x·W'ᵀ + bias        W' as in ``bora_linear``

Adapters are added, switched, merged and removed between calls, layers are replaced and hooks come and go, so nothing is
remembered from one call to the next. A sentence in place of a ``Projection`` says what only the layer's own forward
does right. Layers of PEFT are known by the names of their classes: nothing here imports PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import quantized
from .._private import tensor_of
from ..blocks import Projection
from ..contract import Adapter, Options
from .install import is_waited_for


def read(layer: nn.Module) -> Projection | str:
    """What this layer computes when it is called now, or why that is for its own forward to do."""
    reader = _reader(type(layer))
    return f"its class, {type(layer).__qualname__}, is not known" if reader is None else reader(layer)


def project(layer: nn.Module) -> Projection | str:
    """The same for a layer that is not going to be called."""
    return "a hook or another forward waits for its call" if is_waited_for(layer) else read(layer)


def is_known(layer: nn.Module) -> bool:
    """Whether what a layer of this class computes can be read off it."""
    return _reader(type(layer)) is not None


def is_peft_lora(layer: nn.Module) -> bool:
    """Whether this is a linear layer of PEFT's own LoRA or DoRA."""
    return _reader(type(layer)) is _read_peft_lora


def peft_adapter(layer: Any, name: str) -> Projection | str:
    """What a linear layer of PEFT's own LoRA or DoRA computes with this adapter, which it has."""
    try:
        return _peft_adapter(layer, name)
    except (AttributeError, KeyError) as error:
        return _elsewhere(error)


def _peft_adapter(layer: Any, name: str) -> Projection | str:
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "PEFT is told not to cast inputs"
    dropout_p, variant = _dropout(layer, name), layer.lora_variant.get(name)
    if isinstance(dropout_p, str):
        return dropout_p
    if variant is None:
        return _peft_projection(layer, name, (None, None), Options(layer.scaling[name], dropout_p=dropout_p))
    if type(variant).__name__ != "DoraLinearVariant":
        return "its adapter is a variant of LoRA other than DoRA"
    if dropout_p > 0.0:
        return "PEFT's dropout of DoRA acts on the whole layer"
    magnitude = layer._modules["lora_magnitude_vector"]._modules[name]
    if is_waited_for(magnitude):
        return _HOOKED
    options = Options(layer.scaling[name], detach_norm=True)
    return _peft_projection(layer, name, (tensor_of(magnitude, "weight"), None), options)


def is_plain(x: object, projection: Projection | str) -> bool:
    """Whether this is a tensor without meaning besides its numbers, of the size that the layer takes."""
    if isinstance(projection, str) or type(x) not in _PLAIN:
        return False
    return x.ndim > 0 and x.shape[-1] == projection.weight.shape[1]  # type: ignore[attr-defined] # a tensor


def single_only(projection: Projection) -> str | None:
    """Why a layer can be computed alone and not in a block, or None."""
    if projection.options.dropout_p > 0.0:
        return "dropout acts on the input of an adapter"
    return 'its backend is "reference"' if projection.options.backend == "reference" else None


def halves(projection: Projection) -> tuple[Projection, Projection] | str:
    """The layers that give the halves of what this one gives, or why it is not two layers."""
    weight, bias, adapter, options, compute_dtype = projection
    if isinstance(weight, quantized.Quantized):
        return "its weight, which is quantized, is one for gate and up"
    if adapter is not None and adapter.magnitude_col is not None:
        return "norms of its columns are over gate and up together"

    N = weight.shape[0] // 2

    def rows(of: slice) -> Projection:
        own = None
        if adapter is not None:
            magnitude = adapter.magnitude_row
            own = Adapter(adapter.lora_A, adapter.lora_B[of], None if magnitude is None else magnitude[of])
        return Projection(weight[of], None if bias is None else bias[of], own, options, compute_dtype)

    return rows(slice(N)), rows(slice(N, None))


def can_run_on(x: Tensor, projection: Projection) -> str | None:
    """Why this input cannot be multiplied by these tensors, or None if it can."""
    weight, bias, adapter, _, compute_dtype = projection
    device = x.device
    if weight.device != device:
        return "its weight and its input are on two devices"
    for tensor in (bias, *(adapter or ())):
        if tensor is not None and (tensor.device != device or type(tensor) not in _PLAIN):
            return "its tensors and its input are on several devices, or sharded"
    autocast = torch.is_autocast_enabled(device.type) and x.dtype != torch.float64
    if isinstance(weight, quantized.Quantized):
        if x.dtype != compute_dtype or (autocast and torch.get_autocast_dtype(device.type) != compute_dtype):
            return "its input has another dtype than its quantized weight is multiplied in"
    elif x.dtype != weight.dtype and not autocast:
        return "its input has another dtype than its weight"
    return None


# --- readers of single classes ---------------------------------------------------------------------------------------


def _read_linear(layer: Any) -> Projection | str:
    weight = _frozen(layer)
    return weight if isinstance(weight, str) else Projection(weight, tensor_of(layer, "bias"))


def _read_fused(layer: Any) -> Projection | str:
    """``FusedBoraLinear`` and its kin."""
    if layer.merged:
        return "it is merged"
    stored = "weight" in layer._modules
    weight = layer._modules["weight"].stored() if stored else _dense(tensor_of(layer, "weight"))
    if isinstance(weight, str):
        return weight
    adapter = Adapter(*[tensor_of(layer, name) for name in Adapter._fields])
    dropout_p = layer.dropout if layer.training else 0.0
    options = Options(layer.scaling, layer.norm_order, layer.detach_norm, dropout_p, backend=layer.backend)
    compute_dtype = (layer.compute_dtype or weight.dtype) if stored else None
    return Projection(weight, tensor_of(layer, "bias"), adapter, options, compute_dtype)


def _read_peft_bora(layer: Any) -> Projection | str:
    """This package's layers for PEFT."""
    name, problem = _active_adapter(layer)
    if problem is not None:
        return problem
    base = layer._modules["base_layer"]
    if type(base) is not layer.base_class:
        return "its base layer was replaced"
    if layer._share(name) != 1.0:
        return "its adapter has a scale of its own"
    dropout_p = _dropout(layer, name)
    if isinstance(dropout_p, str):
        return dropout_p
    options = Options(**layer._options(name), dropout_p=dropout_p, backend=layer.backend)
    return _peft_projection(layer, name, layer._magnitudes(name), options)


def _read_peft_lora(layer: Any) -> Projection | str:
    """PEFT's own LoRA and DoRA: DoRA is the row magnitude alone, with norms that are constants in backward."""
    name, problem = _active_adapter(layer)
    return peft_adapter(layer, name) if problem is None else problem


_HOOKED = "a hook or another forward waits for the call of a part of it"


def _elsewhere(error: Exception) -> str:
    return f"this version of PEFT keeps a part of it elsewhere ({error})"


def _active_adapter(layer: Any) -> tuple[str, str | None]:
    """The one adapter that is active, or why there is none such."""
    try:
        disabled, merged = layer._disable_adapters, layer.merged_adapters
        active, present = layer._active_adapter, layer._modules["lora_A"]._modules
    except (AttributeError, KeyError) as error:
        return "", _elsewhere(error)
    if disabled:
        return "", "its adapters are disabled"
    if merged:
        return "", "it is merged"
    if type(active) is str:
        return active, None if active in present else "no adapter is active"
    names = [name for name in active if name in present]
    if len(names) != 1:
        return "", "several adapters are active" if names else "no adapter is active"
    return names[0], None


def _peft_projection(
    layer: Any, name: str, magnitudes: tuple[Tensor | None, Tensor | None], options: Options
) -> Projection | str:
    """A layer of PEFT's structure: a base layer, and modules for each adapter by name."""
    modules = layer._modules
    base = modules["base_layer"]
    A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if is_waited_for(base) or is_waited_for(A) or is_waited_for(B):
        return _HOOKED
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return "its factors are no plain linear layers"
    if tensor_of(A, "bias") is not None or tensor_of(B, "bias") is not None:
        return "its factors have a bias"
    weight = _frozen(base)
    if isinstance(weight, str):
        return weight
    compute_dtype = getattr(base, "compute_dtype", None) if isinstance(weight, quantized.Quantized) else None
    adapter = Adapter(tensor_of(A, "weight"), tensor_of(B, "weight"), *magnitudes)
    return Projection(weight, tensor_of(base, "bias"), adapter, options, compute_dtype)


def _dropout(layer: Any, name: str) -> float | str:
    """The probability that is active on the input of an adapter, or why there is none to tell."""
    dropout = layer._modules["lora_dropout"]._modules[name]
    if is_waited_for(dropout):
        return _HOOKED
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or dropout.p >= 1.0:
        return "its dropout is none of PyTorch's, or drops everything"
    return dropout.p if dropout.training else 0.0


def _frozen(linear: Any) -> Tensor | quantized.Quantized | str:
    """The weight [N, K] of a layer that multiplies by it, or why there is none to take."""
    kind = type(linear)
    if kind is nn.Linear:
        return _dense(tensor_of(linear, "weight"))
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in _DENSE:
        weight = _dense(linear.weight)
        return weight.T if _DENSE[name] and isinstance(weight, Tensor) else weight
    if name not in _QUANTIZED:
        return f"its base layer is of a class that is not known, {name}"
    try:
        return quantized.read(linear) or _dense(linear.weight)
    except (TypeError, ValueError) as error:
        return str(error)


def _dense(weight: Tensor) -> Tensor | str:
    if type(weight) not in _PLAIN:
        return "its weight is sharded or of a class of its own"
    if weight.requires_grad and torch.is_grad_enabled():
        return "its weight is trained"
    return weight if weight.dtype in _DTYPES else "its weight is not of a floating-point dtype"


# Layers that multiply by their weight as nn.Linear does, and whether by its transpose.
_DENSE = {
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}
_QUANTIZED = ("bitsandbytes.nn.modules.Linear4bit",)  # that of 8 bits quantizes its inputs as well
_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_READERS: dict[str, Callable[[Any], Projection | str]] = {
    "torch.nn.modules.linear.Linear": _read_linear,
    "bora_kernels.modules.FusedBoraLinear": _read_fused,
    "bora_kernels.modules.FusedDoraLinear": _read_fused,
    "bora_kernels.modules.FusedColumnLinear": _read_fused,
    "bora_kernels.integrations.peft.linear.BoraLinear": _read_peft_bora,
    "peft.tuners.lora.layer.Linear": _read_peft_lora,
    "peft.tuners.lora.bnb.Linear4bit": _read_peft_lora,
}
_by_class: dict[type, Callable[[Any], Projection | str] | None] = {}


def _reader(kind: type) -> Callable[[Any], Projection | str] | None:
    if torch.compiler.is_compiling():
        return _READERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if kind not in _by_class:
        _by_class[kind] = _READERS.get(f"{kind.__module__}.{kind.__qualname__}")
    return _by_class[kind]
