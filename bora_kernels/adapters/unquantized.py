"""A model whose quantized layers become dense: the dtype that it runs in, and what says that it is quantized."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from ..quantized import read

_ADAPTER = ("lora_", "magnitude_")
_MARKS = (
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_4bit_serializable",
    "is_8bit_serializable",
)


def running_dtype(model: nn.Module) -> torch.dtype | None:
    """What a model computes in outside of its quantized layers: its embedding's dtype, or that of most other weights.

    None where all floating-point weights are adapters.
    """
    find = getattr(model, "get_input_embeddings", None)
    try:
        embedding = find() if find is not None else None
    except NotImplementedError:  # a model of transformers without one
        embedding = None
    if embedding is not None and embedding.weight.dtype.is_floating_point:
        return embedding.weight.dtype
    counts: Counter[torch.dtype] = Counter()
    for module in model.modules():
        if not _is_quantized(module):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype.is_floating_point and not name.startswith(_ADAPTER):
                    counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None


def unmark(model: nn.Module) -> None:
    """Let transformers take a model for what it has become, where layers of its quantization were made dense.

    Without quantized layers it is an ordinary model, which moves, saves and loads as such. Where some are left, their
    configuration names the dense ones as not to be quantized, so that they are loaded as they are.
    """
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    if config is None or quantization is None:
        return
    if not any(_is_quantized(module) for module in model.modules()):
        del config.quantization_config
        for mark in (*_MARKS, "hf_quantizer"):
            if mark in model.__dict__:
                delattr(model, mark)
        model.__dict__["is_quantized"] = False
        return
    for settings in (quantization, getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)):
        for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
            if hasattr(settings, key):
                setattr(
                    settings, key, [n for n, m in model.named_modules() if type(m) is nn.Linear and read(m) is None]
                )


def _is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is a quantized one, of a kind that this package reads or another."""
    if type(module).__module__.startswith("bitsandbytes."):
        return True
    return isinstance(module, nn.Linear) and type(module.weight) not in (Tensor, nn.Parameter)
