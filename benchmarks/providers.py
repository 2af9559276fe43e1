"""The implementations that are compared, and the adapter values that all of them get."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import shutil
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
from .cases import BASES, DTYPES, LEVELS, MODES, Case
from .models import HAS_TRANSFORMERS, Workload, linear_layer

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


@dataclass(frozen=True)
class Provider:
    """One implementation.

    ``adapt(root, targets, rank, adapter_dtype)`` puts it into the root's named linear layers and returns their
    adapters. ``scope`` is open around everything that is run.
    """

    name: str
    title: str
    formula: Formula
    adapt: Callable[[nn.Module, list[str], int, torch.dtype], list[Adapter]]
    ours: bool = False  # held to the package's own accuracy rule
    half: bool = False  # adapters in the base's dtype instead of float32
    charted: bool = False
    graphed: bool = False  # timed in a CUDA graph as well, where the case is
    levels: tuple[str, ...] = LEVELS
    modes: tuple[str, ...] = MODES
    bases: tuple[str, ...] = BASES
    library: str | None = None
    compiled: bool = False
    merged: bool = False
    liger: bool = False  # in a stack that has Liger's kernels
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    by_default: Callable[[Case], bool] = lambda case: True  # whether a run takes it there that does not ask for it

    def adapter_dtype(self, case: Case) -> torch.dtype:
        return DTYPES[case.dtype] if self.half else torch.float32

    def runs(self, case: Case) -> bool:
        """Whether the provider has a place in the case at all."""
        same = self.half and case.dtype == "fp32"  # as the provider with float32 adapters
        has_place = case.level in self.levels and case.mode in self.modes and case.base in self.bases
        return has_place and not same and (self.charted or not case.main_only)

    def problem(self, device: torch.device, base: str) -> str | None:
        """Why it cannot run here, or None."""
        for library in (
            self.library,
            "bitsandbytes" if base == "nf4" else None,
            "liger_kernel" if self.liger else None,
        ):
            if library is not None and importlib.util.find_spec(library) is None:
                return f"{library} is not installed"
        if self.liger and not HAS_TRANSFORMERS:
            return "transformers is not installed"
        if self.liger and device.type != "cuda":
            return "Liger's kernels need a GPU"
        if self.compiled and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "torch.compile needs a C++ compiler on the CPU"
        return None


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
        self.weight = linear.weight
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


def _by_hand(root: nn.Module, targets: list[str], rank: int, adapter_dtype: torch.dtype) -> list[Adapter]:
    for name in targets:
        root.set_submodule(name, LoraByHand(linear_layer(root, name), rank, SCALING, adapter_dtype))
    return [_parameters(root.get_submodule(name), "lora") for name in targets]


def _fused(layer_type: type[FusedBoraLinear], detach_norm: bool) -> Callable:
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


def _peft(member: str) -> Callable:
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


def _after_fuse(adapt: Callable) -> Callable:
    """The same in whole blocks: ``bora_kernels.fuse``."""

    def fused(root: nn.Module, *arguments) -> list[Adapter]:
        adapters = adapt(root, *arguments)
        bora_kernels.fuse(root)
        return adapters

    return fused


def _with_liger(adapt: Callable) -> Callable:
    return lambda root, *arguments: adapt(liger.apply(root), *arguments)


def _full_layer(case: Case) -> bool:
    """No model and no point of a chart: what takes long there is measured where all providers are."""
    return case.level == "layer" and not case.main_only


def _full_layer_or_lead(case: Case) -> bool:
    return _full_layer(case) or case.lead


def _lead(case: Case) -> bool:
    return case.lead


_NONE, _LORA, _DORA, _BORA = Formula("none"), Formula("lora"), Formula("dora", True), Formula("bora")
_BORA_DETACHED = Formula("bora", True)
_fused_dora, _fused_bora = _fused(FusedDoraLinear, True), _fused(FusedBoraLinear, False)
_HALF = "adapters in the base's dtype"
_peer = functools.partial(Provider, charted=True, library="peft")
_layer = functools.partial(Provider, levels=("layer",))
_dense_base = functools.partial(Provider, bases=("dense",))
_ours = functools.partial(Provider, ours=True, graphed=True)
_hand = functools.partial(_dense_base, formula=_LORA, adapt=_by_hand, charted=True, graphed=True)
_model = functools.partial(Provider, levels=("model",), graphed=True)
_blocks = functools.partial(_model, ours=True, charted=True)
_liger = functools.partial(_model, bases=("dense",), liger=True, scope=liger.rotation, by_default=_lead)

PROVIDERS = [
    Provider("frozen", "frozen nn.Linear", _NONE, dense(_NONE), charted=True, graphed=True),
    _peer("peft-lora", "PEFT LoRA", _LORA, _peft("lora")),
    _peer("peft-lora-half", f"PEFT LoRA, {_HALF}", _LORA, _peft("lora"), half=True),
    _hand("lora-by-hand", "LoRA, fused by hand"),
    _hand("lora-by-hand-half", f"LoRA, fused by hand, {_HALF}", half=True),
    _peer("peft-dora", "PEFT DoRA", _DORA, _peft("dora"), by_default=_full_layer_or_lead),
    _peer("peft-dora-half", f"PEFT DoRA, {_HALF}", _DORA, _peft("dora"), half=True),
    _layer("dense-dora", "dense DoRA", _DORA, dense(_DORA)),
    _dense_base("dense-bora", "dense BoRA", _BORA, dense(_BORA), by_default=_full_layer),
    _ours("fused-dora", "FusedDoraLinear, detached", _DORA, _fused_dora),
    _ours("fused-bora", "FusedBoraLinear", _BORA, _fused_bora, charted=True),
    _ours(
        "fused-bora-half",
        f"FusedBoraLinear, {_HALF}",
        _BORA,
        _fused_bora,
        half=True,
        levels=("layer",),
        by_default=lambda case: False,
    ),
    _ours(
        "fused-bora-detached",
        "FusedBoraLinear, detached",
        _BORA_DETACHED,
        _fused(FusedBoraLinear, True),
        levels=("layer",),
    ),
    _ours("peft-bora", "BoraConfig in PEFT", _BORA, _peft("bora"), levels=("model",), library="peft"),
    _ours("fused-bora-merged", "FusedBoraLinear, merged", _BORA, _fused_bora, modes=("inference",), merged=True),
]
_reusing = functools.partial(_ours, modes=("step", "inference"), scope=bora_kernels.reuse_scales)
PROVIDERS += [  # a step after another one with the same adapter
    _reusing("fused-dora-reused", "FusedDoraLinear, detached, scales reused", _DORA, _fused_dora, levels=("layer",)),
    _reusing("fused-bora-reused", "FusedBoraLinear, scales reused", _BORA, _fused_bora, by_default=_full_layer),
]
PROVIDERS += [  # whole blocks, after fuse
    _blocks("peft-lora-fuse", "PEFT LoRA after fuse", _LORA, _after_fuse(_peft("lora")), library="peft"),
    _blocks("peft-dora-fuse", "PEFT DoRA after fuse", _DORA, _after_fuse(_peft("dora")), library="peft"),
    _blocks("fused-bora-fuse", "FusedBoraLinear after fuse", _BORA, _after_fuse(_fused_bora)),
]
_bora_with_liger = _with_liger(_fused_bora)
PROVIDERS += [
    _liger("frozen-liger", "frozen, Liger", _NONE, _with_liger(dense(_NONE)), charted=True),
    _liger("peft-lora-liger", "PEFT LoRA, Liger", _LORA, _with_liger(_peft("lora")), library="peft"),
    _liger(
        "lora-by-hand-liger",
        f"LoRA, fused by hand, {_HALF}, Liger",
        _LORA,
        _with_liger(_by_hand),
        half=True,
        charted=True,
    ),
    _liger("peft-dora-liger", "PEFT DoRA, Liger", _DORA, _with_liger(_peft("dora")), library="peft"),
    _liger("fused-bora-liger", "FusedBoraLinear, Liger", _BORA, _bora_with_liger, charted=True),
    _liger("fused-bora-liger-fuse", "FusedBoraLinear, Liger, after fuse", _BORA, _after_fuse(_bora_with_liger)),
]
# last, because what its compiler leaves behind could disturb the others
PROVIDERS.append(
    _layer(
        "dense-bora-compiled",
        "dense BoRA, torch.compile",
        _BORA,
        dense(_BORA, True),
        compiled=True,
        by_default=_lead,
    )
)
