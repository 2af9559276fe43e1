"""Ways to put adapters into a model, and the adapter values that all providers get."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bora_kernels
from bora_kernels import FusedBoraLinear, FusedDoraLinear, reference

from . import liger
from .by_hand import LoraByHand
from .models import Workload, linear_layer

Adapter = dict[str, nn.Parameter]  # "lora_A" [R, K], "lora_B" [N, R], "magnitude_row" [N], "magnitude_col" [K]
KINDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "lora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "magnitude_row"),
    "bora": ("lora_A", "lora_B", "magnitude_row", "magnitude_col"),
}
SCALING = 2.0  # alpha = 2 r at every rank


@dataclass(frozen=True)
class Formula:
    """What a provider computes: the member of the family and whether norms are constants in backward."""

    member: str
    detach_norm: bool = False


def adapter_values(weight: Tensor, rank: int, seed: int) -> dict[str, Tensor]:
    """Values of a trained adapter: B not zero, magnitudes up to 20 % off the norms of the weight.

    All are representable in bfloat16, so that every adapter dtype holds the same.
    """
    out_features, in_features = weight.shape
    generator = torch.Generator(weight.device).manual_seed(seed)

    def random(draw: Callable, *shape: int) -> Tensor:
        return draw(*shape, generator=generator, device=weight.device)

    values = {
        "lora_A": random(torch.randn, rank, in_features) * in_features**-0.5,
        "lora_B": random(torch.randn, out_features, rank) * 0.02,
        "magnitude_row": weight.float().norm(dim=1) * (0.8 + 0.4 * random(torch.rand, out_features)),
        "magnitude_col": weight.float().norm(dim=0) * (0.8 + 0.4 * random(torch.rand, in_features)),
    }
    return {kind: value.bfloat16() for kind, value in values.items()}


@torch.no_grad()
def install(
    adapt: Callable, root: nn.Module, workload: Workload, rank: int, adapter_dtype: torch.dtype
) -> list[Adapter]:
    """Adapt the targets in a root of the workload and give every adapter its values; only they are trained."""
    adapters = adapt(root, workload.targets, rank, adapter_dtype)
    root.requires_grad_(False)
    for seed, (weight, adapter) in enumerate(zip(workload.weights, adapters, strict=True)):
        values = adapter_values(weight, rank, seed)
        for kind, parameter in adapter.items():
            parameter.copy_(values[kind])
            parameter.requires_grad_(True)
    return adapters


class DenseLinear(nn.Module):
    """The package's reference as a layer: the dense effective weight, differentiated by autograd."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude_row: nn.Parameter | None
    magnitude_col: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, formula: Formula, rank: int, adapter_dtype: torch.dtype, compiled: bool
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        (N, K), device = linear.weight.shape, linear.weight.device
        shapes = {"lora_A": (rank, K), "lora_B": (N, rank), "magnitude_row": (N,), "magnitude_col": (K,)}
        for kind, shape in shapes.items():
            present = kind in KINDS[formula.member]
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=adapter_dtype)) if present else None
            setattr(self, kind, parameter)
        self.detach_norm = formula.detach_norm
        self.function = _compiled_reference(N, K, rank, adapter_dtype) if compiled else reference.bora_linear_ref

    def forward(self, x: Tensor) -> Tensor:
        return self.function(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.magnitude_row,
            self.magnitude_col,
            self.bias,
            scaling=SCALING,
            detach_norm=self.detach_norm,
        )


@functools.lru_cache(maxsize=1)
def _compiled_reference(*shape) -> Callable:
    torch._dynamo.reset()  # what was compiled for other shapes counts against the limit of recompilations
    return torch.compile(reference.bora_linear_ref, dynamic=False)


def dense(formula: Formula, compiled: bool = False) -> Callable:
    """``adapt`` of the dense reference."""

    def adapt(root: nn.Module, targets: list[str], rank: int, adapter_dtype: torch.dtype) -> list[Adapter]:
        if formula.member == "none":
            return [{} for _ in targets]
        for name in targets:
            layer = DenseLinear(linear_layer(root, name), formula, rank, adapter_dtype, compiled)
            root.set_submodule(name, layer)
        return [_parameters(root.get_submodule(name), formula.member) for name in targets]

    return adapt


def by_hand(root: nn.Module, targets: list[str], rank: int, adapter_dtype: torch.dtype) -> list[Adapter]:
    for name in targets:
        root.set_submodule(name, LoraByHand(linear_layer(root, name), rank, SCALING, adapter_dtype))
    return [_parameters(root.get_submodule(name), "lora") for name in targets]


def fused(layer_type: type[FusedBoraLinear], detach_norm: bool) -> Callable:
    def adapt(root: nn.Module, targets: list[str], rank: int, adapter_dtype: torch.dtype) -> list[Adapter]:
        for name in targets:
            layer = layer_type.from_linear(
                linear_layer(root, name),
                rank,
                SCALING * rank,
                detach_norm=detach_norm,
                adapter_dtype=adapter_dtype,
            )
            root.set_submodule(name, layer)
        member = "dora" if layer_type is FusedDoraLinear else "bora"
        return [_parameters(root.get_submodule(name), member) for name in targets]

    return adapt


def _parameters(layer: nn.Module, member: str) -> Adapter:
    return {kind: getattr(layer, kind) for kind in KINDS[member]}


def peft(member: str) -> Callable:
    """LoRA and DoRA as PEFT has them, BoRA as this package adds it to PEFT."""

    def adapt(root: nn.Module, targets: list[str], rank: int, adapter_dtype: torch.dtype) -> list[Adapter]:
        from peft import LoraConfig, get_peft_model

        from bora_kernels.integrations.peft import BoraConfig

        config_type = BoraConfig if member == "bora" else LoraConfig
        config = config_type(r=rank, lora_alpha=SCALING * rank, target_modules=targets, use_dora=member == "dora")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on models without a configuration
            get_peft_model(root, config, autocast_adapter_dtype=adapter_dtype == torch.float32)
        adapters = []
        for name in targets:
            layer: Any = root.get_submodule(name)
            adapter = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
            if member == "dora":
                adapter["magnitude_row"] = layer.lora_magnitude_vector["default"].weight
            elif member == "bora":
                adapter["magnitude_row"] = layer.lora_magnitude_vector_row["default"].weight
                adapter["magnitude_col"] = layer.lora_magnitude_vector_col["default"].weight
            for parameter in adapter.values():  # over a quantized weight PEFT leaves them in float32
                parameter.data = parameter.data.to(adapter_dtype)
            adapters.append(adapter)
        return adapters

    return adapt


def after_fuse(adapt: Callable) -> Callable:
    """The same in whole blocks: ``bora_kernels.fuse``."""

    def fused(root: nn.Module, *arguments) -> list[Adapter]:
        adapters = adapt(root, *arguments)
        bora_kernels.fuse(root)
        return adapters

    return fused


def with_liger(adapt: Callable) -> Callable:
    return lambda root, *arguments: adapt(liger.apply(root), *arguments)


def compiled(adapt: Callable) -> Callable:
    """The same under ``torch.compile``, the whole model at once."""

    def adapted(root: nn.Module, *arguments) -> list[Adapter]:
        adapters = adapt(root, *arguments)
        torch._dynamo.reset()  # what was compiled of other models counts against the limit of recompilations
        root.compile(dynamic=False)
        return adapters

    return adapted
