"""Adapters of whole models without PEFT: their tensors, saving, loading, merging. ``files`` has the format."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial, reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import FusedBoraLinear
from . import contents, unquantized
from .conversion import (
    METHODS,
    Model,
    adapt,
    adapted_layers,
    adapter_parameters,
    check_unwrapped,
    leave_no_trace,
    named_modules,
    plain_name,
    replace,
)
from .coverage import moved_statistics
from .files import PREFIX, SUFFIXES, AdapterDescription, exact_pattern, read_adapter, write_adapter

_SHARED = ("norm_order", "detach_norm", "rslora", "dropout")  # what all layers of a file have in common
_LISTED = 5  # problems that an error spells out before it only counts them


def adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What was trained, under the names that ``save_adapter`` writes and PEFT reads.

    These are the adapters; of other modules with parameters that require a gradient, parameters and buffers; what
    adapted layers train besides, such as biases; and running statistics of batch norms that moved since the model was
    adapted.

    Args:
        model: a converted model; DistributedDataParallel and AveragedModel around it, and ``torch.compile``, are looked
            through, here and in the other functions of this file.
        state_dict: the model's, where ``model.state_dict()`` does not hold whole tensors, as under FSDP:
            ``torch.distributed.checkpoint.state_dict.get_model_state_dict`` gives one.

    Raises:
        ValueError: where the model has no adapted layer, or one whose adapter is computed by a parametrization.
    """
    model, prefix = contents.unwrapped(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model must have adapted layers (bora_kernels.convert makes them), got none")
    state = {plain_name(name): t for name, t in (model.state_dict() if state_dict is None else state_dict).items()}
    if f"{next(iter(layers))}.lora_A" not in state:  # the wrapper's own dictionary
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    tensors = {}
    for name, layer in layers.items():
        for parameter in adapter_parameters(layer):
            if f"{name}.{parameter}" not in state:
                raise ValueError(
                    f"{name}.{parameter} must be a parameter of its layer to be saved, got one that is computed from "
                    "others: call torch.nn.utils.parametrize.remove_parametrizations first"
                )
            tensors[f"{PREFIX}{name}.{SUFFIXES[parameter]}"] = state[f"{name}.{parameter}"]
    modules = contents.also_trained(model)
    single = {*contents.trained_inside(layers), *map(plain_name, moved_statistics(model))}
    others = [name for name in state if name.rpartition(".")[0] in modules or name in single]
    return tensors | {PREFIX + contents.name_in_peft(name, layers): state[name] for name in others}


def save_adapter(
    model: nn.Module, folder: str | PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write what was trained to a folder: ``adapter_model.safetensors`` and ``adapter_config.json``.

    ``load_adapter`` reads them, and so does PEFT with ``bora_kernels.integrations.peft``. The tensors and the argument
    ``state_dict`` are those of ``adapter_state_dict``.

    Raises:
        ValueError: where the model has no adapted layer, layers differ in more than rank and alpha, or a tensor is
            sharded; nothing is written then.
    """
    tensors = adapter_state_dict(model, state_dict)
    model, _ = contents.unwrapped(model)
    layers = adapted_layers(model)
    whole = [name for name, module in contents.also_trained(model).items() if not any(module.children())]  # PEFT's kind
    config = {
        "target_modules": contents.exact_targets(model, layers),
        "modules_to_save": whole or None,
        "bias": "lora_only" if any(name.endswith(".bias") for name in contents.trained_inside(layers)) else "none",
        "auto_mapping": contents.auto_mapping(model),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
    }
    write_adapter(Path(folder), tensors, _describe(layers), config)


def load_adapter(model: Model, path: str | PathLike[str]) -> Model:
    """Load an adapter into its base model, which is converted, or into a model that was converted alike.

    Args:
        model: the base model, or one whose adapted layers are those of the file. Of the latter the parameters stay
            the same objects, so that an optimizer keeps them.
        path: a folder that ``save_adapter`` or PEFT wrote (BoRA or DoRA), or the safetensors file of the former alone.

    Returns:
        The same model. New layers have the dtype of the file and are trainable as ``convert`` leaves them.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a newer format, and for layers, shapes, dtypes and options that do not fit, by name; for a model
            of PEFT, or a base model inside DistributedDataParallel; before the model changes.
    """
    base, _ = contents.unwrapped(model)
    description, tensors = read_adapter(Path(path))
    layers, others = _by_layer(tensors)
    modules = dict(named_modules(base, every_place=True))
    state = {plain_name(name): tensor for name, tensor in base.state_dict(keep_vars=True).items()}
    if description.method not in METHODS:
        raise ValueError(f"{path} must have a method of {', '.join(METHODS)}, got {description.method!r}")
    problems = [] if layers else ["it holds no adapted layer"]
    found: dict[nn.Module, str] = {}
    for name in (name for name in layers if name in modules):
        first = found.setdefault(modules[name], name)
        if first != name:
            problems.append(f"{name} is the same layer as {first}")
    problems += [f"{name} is missing" for name, layer in adapted_layers(base).items() if layer not in found]
    for name, parameters in layers.items():
        problems += _layer_problems(name, modules.get(name), parameters, description)
    for name, tensor in others.items():
        problems += _tensor_problems(name, tensor, state.get(name))
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"{path} must fit the model: {'; '.join(problems[:_LISTED])}{more}")

    new = {
        linear: _maker(name, parameters, description)
        for name, parameters in layers.items()
        if isinstance(linear := modules[name], nn.Linear)
    }
    if new:
        check_unwrapped(model)
        adapt(base, new)
        for name in others:
            if isinstance(state[name], nn.Parameter):
                state[name].requires_grad_()
    with torch.no_grad():
        for name, module in named_modules(base, every_place=True):
            if isinstance(module, FusedBoraLinear) and name in layers:
                module.unmerge()
                for parameter, tensor in layers[name].items():
                    getattr(module, parameter).copy_(tensor)
        for name, tensor in others.items():
            state[name].copy_(tensor)
    return model


def merge_adapter(model: Model) -> Model:
    """Replace every adapted layer in place by a plain, frozen ``torch.nn.Linear`` with the weight W'.

    W' is computed in float32 and rounded once to the weight's dtype, in half precision with dither (see
    ``FusedBoraLinear.effective_weight``); over quantized weights to the dtype that the model runs in, and what marks
    the model as quantized is taken off it. The model then needs this package no more: fused parts have forwards of
    their classes again. To go back and forth instead, call ``merge()`` and ``unmerge()`` of the layers, which keep W0.

    Returns:
        The same model.

    Raises:
        ValueError: where the model contains no adapted layer.
    """
    layers = [(name, layer) for name, layer in adapted_layers(model).items() if name]
    if not layers:
        raise ValueError(f"model must contain adapted layers, got {type(model).__name__} without any")
    dtype = unquantized.running_dtype(model)
    any_quantized = any(not isinstance(layer.weight, Tensor) for _, layer in layers)
    while layers:  # one at a time, so that each W0 is freed before the next W' is made
        name, layer = layers.pop()
        tied = [n for n, m in named_modules(model) if m is not layer and getattr(m, "weight", None) is layer.weight]
        if tied:
            warnings.warn(
                f"{name} shared its weight with {tied[0]} and no longer does. Before saving the model, say so in its "
                "configuration (in transformers: model.config.tie_word_embeddings = False)",
                stacklevel=2,
            )
        replace(model, {layer: layer.to_linear(None if isinstance(layer.weight, Tensor) else dtype)})
    leave_no_trace(model)
    if any_quantized:
        unquantized.unmark(model)
    return model


# --- saving ----------------------------------------------------------------------------------------------------------


def _describe(layers: Mapping[str, FusedBoraLinear]) -> AdapterDescription:
    """The options of all layers; the most common rank and alpha, and a pattern for each layer with another one."""
    common: dict[str, Any] = {}
    for name, layer in layers.items():
        options = {"method": _method(layer), **{option: getattr(layer, option) for option in _SHARED}}
        common = common or options
        if options != common:
            raise ValueError(f"model must have the same options in all layers, got {common} and in {name} {options}")
    alphas = {name: contents.alpha_of(layer) for name, layer in layers.items()}
    rank = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return AdapterDescription(
        **common,
        rank=rank,
        alpha=alpha,
        rank_pattern={exact_pattern(name): m.r for name, m in layers.items() if m.r != rank},
        alpha_pattern={exact_pattern(name): own for name, own in alphas.items() if own != alpha},
    )


def _method(layer: FusedBoraLinear) -> str:
    return next(method for method, cls in reversed(METHODS.items()) if isinstance(layer, cls))


# --- loading ---------------------------------------------------------------------------------------------------------


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Adapters as {layer: {parameter: tensor}}, and the other tensors."""
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        parameter = next((p for p, suffix in SUFFIXES.items() if name.endswith(f".{suffix}")), None)
        if parameter is None:
            others[name.replace(f".{contents.INSIDE}", ".")] = tensor
        else:
            layers.setdefault(name.removesuffix(f".{SUFFIXES[parameter]}"), {})[parameter] = tensor
    return layers, others


def _maker(
    name: str, parameters: Mapping[str, Tensor], description: AdapterDescription
) -> Callable[[nn.Linear], FusedBoraLinear]:
    """What makes the layer of that name of its linear layer."""
    return partial(
        METHODS[description.method].from_linear,
        r=description.rank_of(name),
        alpha=description.alpha_of(name),
        adapter_dtype=reduce(torch.promote_types, (tensor.dtype for tensor in parameters.values())),
        **{option: getattr(description, option) for option in _SHARED},
    )


def _layer_problems(
    name: str, module: nn.Module | None, parameters: Mapping[str, Tensor], description: AdapterDescription
) -> list[str]:
    """Why an adapter of the file does not fit its layer."""
    if module is None:
        return [f"{name} is unknown"]
    if not isinstance(module, (nn.Linear, FusedBoraLinear)):
        return [f"{name} must be a torch.nn.Linear, got {type(module).__name__}"]
    rank, N, K = description.rank_of(name), module.out_features, module.in_features
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, K), "lora_B": (N, rank)}
    members = METHODS[description.method].members
    shapes |= ({"magnitude_row": (N,)} if members.row else {}) | ({"magnitude_col": (K,)} if members.col else {})
    targets: Mapping[str, Tensor | None] = dict.fromkeys(shapes)
    problems = []
    if isinstance(module, FusedBoraLinear):
        targets = adapter_parameters(module)
        ours, theirs = (
            (_method(module), module.r, contents.alpha_of(module), module.rslora, module.norm_order),
            (description.method, rank, description.alpha_of(name), description.rslora, description.norm_order),
        )
        if ours != theirs:
            names = "method, rank, alpha, rslora, norm order"
            return [f"{name} must have the {names} {ours}, got {theirs}"]
    for parameter, shape in shapes.items():
        if parameter not in parameters:
            problems.append(f"{name} must have {parameter}, got {', '.join(parameters)}")
        else:
            problems += _tensor_problems(f"{name}.{parameter}", parameters[parameter], targets[parameter], shape)
    problems += [f"{name} must not have {parameter}" for parameter in parameters.keys() - shapes.keys()]
    return problems


def _tensor_problems(
    name: str, tensor: Tensor, target: Tensor | None, shape: tuple[int, ...] | None = None
) -> list[str]:
    """Why a tensor of the file does not fit the model's, or the shape of the one that is to be made."""
    if shape is None:
        if target is None:
            return [f"{name} is unknown"]
        shape = tuple(target.shape)
    if tuple(tensor.shape) != shape:
        return [f"{name} must be {list(shape)}, got {list(tensor.shape)}"]
    if target is None and not tensor.is_floating_point():
        return [f"{name} must have a floating-point dtype, got {tensor.dtype}"]
    if target is not None and torch.promote_types(tensor.dtype, target.dtype) != target.dtype:
        return [f"{name} must fit into {target.dtype}, got {tensor.dtype}"]
    return []
