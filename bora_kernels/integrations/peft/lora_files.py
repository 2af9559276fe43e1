"""BoRA of PEFT as plain LoRA, by rank or by error: linear layers, embeddings and convolutions.

PEFT's own ``convert_to_lora`` and ``save_as_lora`` work on linear layers; these say what a conversion loses as well.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ... import _private
from ...adapters.contents import exact_targets
from ...adapters.files import PREFIX, copies, write_files
from ...adapters.lora_files import LoraReport, check_bounds, ranks, truncate
from . import through
from .layers import BoraLayer
from .linear import BoraLinear
from .other_layers import BoraEmbedding


def convert_to_lora(
    model: Any,
    *,
    rank: int | None = None,
    error: float | None = None,
    adapter_name: str = "default",
    verbose: bool = True,
) -> tuple[LoraConfig, dict[str, Tensor], LoraReport]:
    """The nearest LoRA of a rank or of an error, as PEFT's function of this name gives it, and what it leaves out.

        W' − W0 ≈ B·A        error = ‖W' − W0 − B·A‖ / ‖W' − W0‖ of each layer, in Frobenius's norm

    Args:
        model: a PeftModel, or a model that adapters were put into, as diffusers' ``add_adapter`` does.
        rank, error, verbose: as in ``bora_kernels.save_as_lora``.
        adapter_name: which adapter.

    Returns:
        The configuration, the tensors by the names that PEFT gives them in this model, and ranks and errors by layer.

    Raises:
        ValueError: for bounds out of range, an adapter that is not there, sharded or not finite weights, and for what a
            LoRA file would lack: trained biases and tokens, and the change that PiSSA and OLoRA make to W0.
    """
    check_bounds(rank, error)
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, BoraLayer)}
    layers = {name: layer for name, layer in adapted.items() if adapter_name in layer.norm_order}
    if not layers:
        known = sorted({name for layer in adapted.values() for name in layer.norm_order})
        raise ValueError(f"adapter_name must be one of {', '.join(known) or '(there is none)'}, got {adapter_name!r}")
    config = model.peft_config[adapter_name]
    for option, nothing in (("bias", "none"), ("trainable_token_indices", None)):
        if getattr(config, option) != nothing:
            raise ValueError(f"{option} must be {nothing} to write LoRA, got {getattr(config, option)!r}")
    if moved := [name for name, layer in layers.items() if layer.moved_base]:
        raise ValueError(
            f"init_lora_weights must leave the base weight as it was, got {config.init_lora_weights!r} in {moved[0]}"
        )
    for name, layer in layers.items():
        if _private.is_wrapper(next(p for n, p in layer.named_parameters() if f".{adapter_name}" in n)):
            raise ValueError(f"model must hold whole tensors, got sharded ones in {name}")

    prefix = PREFIX if isinstance(model, PeftModel) else ""
    names = [name.removeprefix(prefix) for name in layers]
    changes = (_change(name, layer, adapter_name) for name, layer in zip(names, layers.values(), strict=True))
    factors, report = truncate(changes, names, rank, error, verbose)
    tensors: dict[str, Tensor] = {}
    for name, layer in zip(names, layers.values(), strict=True):
        tensors |= {f"{prefix}{name}.{key}": t for key, t in _in_layout(layer, *factors[name]).items()}
    if config.modules_to_save:
        state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        tensors |= {
            name: t for name, t in state.items() if not any(f"{name}.".startswith(f"{layer}.") for layer in layers)
        }
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    config = LoraConfig(
        target_modules=exact_targets(inner, dict(zip(names, layers.values(), strict=True))),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        fan_in_fan_out=all(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        inference_mode=True,
        **ranks(report),
    )
    return config, tensors, report


def save_as_lora(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    rank: int | None = None,
    error: float | None = None,
    adapter_name: str = "default",
    verbose: bool = True,
) -> LoraReport:
    """Write what ``convert_to_lora`` gives, for ``PeftModel.from_pretrained`` without this package.

    Arguments and errors are those of ``convert_to_lora``; nothing is written before all layers are converted.
    """
    config, tensors, report = convert_to_lora(model, rank=rank, error=error, adapter_name=adapter_name, verbose=verbose)
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_files(Path(path), copies(tensors), {"format": "pt"}, values)
    return report


def _change(name: str, layer: Any, adapter_name: str) -> tuple[str, Tensor, float]:
    """W' − W0 as a matrix, and ‖W0‖."""
    with through.whole(layer):
        weight = layer._matrices(adapter_name)[0]
        return name, layer.delta_matrix(adapter_name), weight.float().norm().item()


def _in_layout(layer: Any, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The factors [k, K·taps] and [N, k] by the names and shapes that PEFT has for a kind of layer."""
    if isinstance(layer, BoraEmbedding):
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    if not isinstance(layer, BoraLinear):  # a convolution
        kernel = layer.get_base_layer().weight.shape[1:]
        A, B = A.reshape(len(A), *kernel), B.reshape(*B.shape, *(1 for _ in kernel[1:]))
    return {"lora_A.weight": A, "lora_B.weight": B}
