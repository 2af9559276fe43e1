"""``explain``: which layers of a model run on which backend, and why."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import quantized
from ..contract import Backend
from ..fusion.report import FusedPart, fused_parts, left_out
from ..modules import FusedBoraLinear
from ..ops import validation
from ..quantized.module import StoredWeight
from . import coverage
from .conversion import named_modules, plain_name

_PEFT = "bora_kernels.integrations.peft"


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer. ``backend`` is what it would run on now, with inputs of its weight's dtype."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of the weight; [out_features, in_features] of a linear layer
    rank: int | None  # None: no adapter is active
    dtype: torch.dtype
    device: torch.device
    backend: Backend | Literal["none"]  # "none": the frozen or the merged weight runs alone
    reason: str


@dataclass(frozen=True)
class Explanation:
    """All adapted layers of a model, and what has no adapter: linear layers and experts; ``str`` makes a table."""

    layers: tuple[LayerReport, ...]
    frozen: tuple[str, ...]
    experts: tuple[str, ...] = ()  # weights of three axes, which no layer of this package adapts
    experts_held: str = ""  # how many weights these are
    fused: tuple[FusedPart, ...] = ()  # what ``fuse`` made run as one
    not_fused: tuple[tuple[str, str], ...] = ()  # what it left as it was, with the reason
    others: tuple[tuple[str, str], ...] = ()  # weights that no linear layer holds, with the class that does

    def __str__(self) -> str:
        rows = Counter(
            (
                re.sub(r"\d+", "*", layer.name),
                layer.kind,
                "×".join(map(str, layer.shape)),
                "-" if layer.rank is None else str(layer.rank),
                f"{layer.dtype}".removeprefix("torch."),
                f"{layer.device}",
                layer.backend,
                layer.reason,
            )
            for layer in self.layers
        )
        table: list[tuple[str, ...]] = [
            ("layer", "", "class", "weight", "rank", "dtype", "device", "backend", "because")
        ]
        table += [(name, f"{count}×", *rest) for (name, *rest), count in rows.items()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        backends = Counter(layer.backend for layer in self.layers)
        counts = ", ".join(f"{count} {backend}" for backend, count in backends.items()) or "none"
        lines.append(f"adapted layers: {counts}; linear layers without an adapter: {len(self.frozen) or 'none'}")
        if self.experts:
            names = dict.fromkeys(re.sub(r"\d+", "*", name) for name in self.experts)
            lines.append(f"experts without an adapter: {', '.join(names)}: {self.experts_held}")
        others = Counter((re.sub(r"\d+", "*", name), kind) for name, kind in self.others)
        lines += [f"without an adapter: {name}  {count}×, of {kind}" for (name, kind), count in others.items()]
        parts = Counter((re.sub(r"\d+", "*", part.name), part.kind, part.problem) for part in self.fused)
        for (name, kind, problem), count in parts.items():
            lines.append(f"fused: {name}  {count}× {kind}" + (f", but not in a call now: {problem}" if problem else ""))
        rest = Counter((re.sub(r"\d+", "*", name), reason) for name, reason in self.not_fused)
        lines += [f"not fused: {name}  {count}×: {reason}" for (name, reason), count in rest.items()]
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Which layers of a model run on which backend, and why: ``print(bora_kernels.explain(model))``.

    Covers ``FusedBoraLinear``, ``FusedDoraLinear`` and the layers of ``bora_kernels.integrations.peft``, and lists what
    ``fuse`` made run as one and what it left as it was, with the reasons. Nothing is run. Under ``torch.autocast``
    autocast's dtype decides, not the weight's, which is what is reported.
    """
    layers, frozen = [], []
    inside: set[nn.Module] = set()
    for name, module in named_modules(model):
        report = _report(name, module)
        if report is not None:
            layers.append(report)
            inside.update(module.modules())
        elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict):  # a layer of PEFT's own
            inside.update(module.modules())
        elif isinstance(module, nn.Linear) and module not in inside:
            frozen.append(name)
    experts = coverage.expert_weights(model)
    adapted = {f"{name}.weight" for name, module in model.named_modules() if module in inside}
    held = coverage.describe_experts(experts, model) if experts else ""
    return Explanation(
        tuple(layers),
        tuple(frozen),
        tuple(map(plain_name, experts)),
        held,
        tuple(replace(part, name=plain_name(part.name)) for part in fused_parts(model)),
        tuple((plain_name(name), reason) for name, reason in left_out(model).items()),
        tuple((plain_name(name), kind) for name, kind in coverage.other_weights(model).items() if name not in adapted),
    )


def _report(name: str, module: nn.Module) -> LayerReport | None:
    weight: Tensor | StoredWeight | quantized.Quantized
    rank: int | None
    if isinstance(module, FusedBoraLinear):
        weight, rank, merged = module.weight, module.r, module.merged
        compute_dtype = module.compute_dtype
    elif _PEFT in sys.modules and isinstance(module, sys.modules[_PEFT].BoraLayer):
        base, merged = module.get_base_layer(), module.merged
        weight = quantized.read(base) or base.weight
        compute_dtype = getattr(base, "compute_dtype", None)
        active = [] if module.disable_adapters else [n for n in module.active_adapters if n in module.r]
        rank = module.r[active[0]] if active else None
    else:
        return None
    dtype = compute_dtype or weight.dtype
    backend, reason = _backend(module, weight.device, dtype, rank, merged)
    shape = tuple(weight.shape)
    return LayerReport(name, type(module).__name__, shape, rank, dtype, weight.device, backend, reason)


def _backend(
    module: Any, device: torch.device, dtype: torch.dtype, rank: int | None, merged: bool
) -> tuple[Backend | Literal["none"], str]:
    """The backend's name and why it is that one."""
    if merged:
        return "none", "it is merged"
    if rank is None:
        return "none", "no adapter is active"
    if not hasattr(module, "backend"):
        return "torch", "only linear layers have kernels"
    problem = validation.triton_problem(device, dtype) or validation.rank_problem(rank)
    if module.backend is not None:
        fails = module.backend == "triton" and problem is not None
        return module.backend, f"layer.backend says so, but cannot run: {problem}" if fails else "layer.backend says so"
    if device.type != "cuda":
        return "torch", f"it is the default on {device.type}"
    return ("triton", "it is the default on cuda") if problem is None else ("torch", f"triton cannot run: {problem}")
