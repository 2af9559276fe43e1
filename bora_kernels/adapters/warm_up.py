"""``warm_up``: the kernels of a model's adapted layers, compiled before they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..fusion.install import installed
from ..fusion.members import read
from ..ops import reuse
from ..replay import replay_disabled
from ..replay.recording import planning
from .conversion import named_modules
from .diagnostics import explain


def warm_up(model: nn.Module, tokens: int | Iterable[int]) -> int:
    """Compile the kernels that a model's adapted linear layers need at these numbers of tokens, all side by side.

    For servers and trainers whose first step is not to wait for a compiler. In training mode these are the kernels of
    forward and backward and of a forward without gradients, as under checkpointing; in eval mode the latter alone.
    Kernels are the same for many numbers of tokens: they differ where a number is no multiple of 16, and in the tiles
    and parts that fill the device for it, most below some 5,000. Under ``torch.autocast`` they are those of its dtype.

    Nothing is computed: layers run on inputs of these sizes without a launch, and hooks are not called. Parameters,
    gradients and random numbers stay as they are; what ``reuse_scales`` has is forgotten.

        bora_kernels.warm_up(model.train(), tokens=[8 * 2048])

    Args:
        model: a model on its devices, with layers of ``convert``, of ``BoraConfig``, or of PEFT's that ``fuse`` took.
        tokens: rows of a layer's input, batch times length; one number or several.

    Returns:
        How many kernels were compiled or found in Triton's cache on disk; 0 where all were ready, and without a GPU.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    counts = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    for count in counts:
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"tokens must be an int or several, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"tokens must be positive, got {count}")
    layers = list(_layers(model))
    if not layers:
        return 0
    from ..replay.compiling import Missing  # Triton is imported only when it is used

    missing = Missing()
    devices = {device.index for _, _, _, device in layers if device.index is not None}
    reuse.forget()  # scales that are there would hide the kernels that make them
    try:
        with (
            torch.random.fork_rng(sorted(devices)),  # dropout draws
            torch.autograd.set_multithreading_enabled(False),  # backward in this thread, whose launches do not happen
            replay_disabled(),
            planning(missing),
        ):
            for layer, in_features, dtype, device in layers:
                for count in counts:
                    _run(layer, torch.zeros(count, in_features, dtype=dtype, device=device))
    finally:
        reuse.forget()  # those of this run are whatever was in memory
    return missing.compile()


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, int, torch.dtype, torch.device]]:
    """Layers that run on kernels now: columns of the weight, dtype of the input, and the device."""
    modules = dict(named_modules(model))
    for report in explain(model).layers:
        layer = modules[report.name]
        sharded = any(hasattr(parameter, "device_mesh") for parameter in layer.parameters())
        if report.backend == "triton" and _is_gpu(report.device) and not sharded:
            yield layer, report.shape[1], report.dtype, report.device
    for layer in model.modules():
        forward: Any = installed(layer)
        if forward is None or forward.func.part.problem(*forward.args) is not None:
            continue
        projection = read(layer)  # of a layer; a fused block is none
        if not isinstance(projection, str) and _is_gpu(projection[0].device):
            weight, *_, compute_dtype = projection
            yield layer, weight.shape[1], compute_dtype or weight.dtype, weight.device


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _run(layer: Any, x: torch.Tensor) -> None:
    if layer.training:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
            y = layer.forward(inputs[0])  # not through hooks
            torch.autograd.grad(y, inputs, torch.zeros_like(y), allow_unused=True)
    with torch.no_grad():
        layer.forward(x)
