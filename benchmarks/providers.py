"""The implementations that are compared."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import shutil
from collections.abc import Callable

import torch
from torch import nn

import bora_kernels
from bora_kernels import FusedBoraLinear, FusedDoraLinear

from . import liger
from .adapting import Adapter, Formula, after_fuse, by_hand, compiled, dense, fused, peft, with_liger
from .cases import BASES, DTYPES, LEVELS, MODES, Case
from .models import HAS_TRANSFORMERS, STACKS


@dataclasses.dataclass(frozen=True)
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
        other = self.liger and case.level == "model" and STACKS[case.shape].family != "Llama"
        return has_place and not same and not other and (self.charted or not case.main_only)

    def problem(self, device: torch.device, case: Case) -> str | None:
        """Why it cannot run here, or None."""
        for library in (
            self.library,
            "bitsandbytes" if case.base == "nf4" else None,
            "liger_kernel" if self.liger else None,
        ):
            if library is not None and importlib.util.find_spec(library) is None:
                return f"{library} is not installed"
        if not HAS_TRANSFORMERS and (self.liger or (case.level == "model" and STACKS[case.shape].family != "Llama")):
            return "transformers is not installed"
        if self.liger and device.type != "cuda":
            return "Liger's kernels need a GPU"
        if self.compiled and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "torch.compile needs a C++ compiler on the CPU"
        return None


def _full_layer(case: Case) -> bool:
    """No model and no point of a chart: what takes long there is measured where all providers are."""
    return case.level == "layer" and not case.main_only


def _full_layer_or_lead(case: Case) -> bool:
    return _full_layer(case) or case.lead


def _lead(case: Case) -> bool:
    return case.lead


_NONE, _LORA, _DORA, _BORA = Formula("none"), Formula("lora"), Formula("dora", True), Formula("bora")
_BORA_DETACHED = Formula("bora", True)
_fused_dora, _fused_bora = fused(FusedDoraLinear, True), fused(FusedBoraLinear, False)
_HALF = "adapters in the base's dtype"
_peer = functools.partial(Provider, charted=True, library="peft")
_layer = functools.partial(Provider, levels=("layer",))
_dense_base = functools.partial(Provider, bases=("dense",))
_ours = functools.partial(Provider, ours=True, graphed=True)
_hand = functools.partial(_dense_base, formula=_LORA, adapt=by_hand, charted=True, graphed=True)
_model = functools.partial(Provider, levels=("model",), graphed=True)
_blocks = functools.partial(_model, ours=True, charted=True)
_liger = functools.partial(_model, bases=("dense",), liger=True, scope=liger.rotation, by_default=_lead)

PROVIDERS = [
    Provider("frozen", "frozen nn.Linear", _NONE, dense(_NONE), charted=True, graphed=True),
    _peer("peft-lora", "PEFT LoRA", _LORA, peft("lora")),
    _peer("peft-lora-half", f"PEFT LoRA, {_HALF}", _LORA, peft("lora"), half=True),
    _hand("lora-by-hand", "LoRA, fused by hand"),
    _hand("lora-by-hand-half", f"LoRA, fused by hand, {_HALF}", half=True),
    _peer("peft-dora", "PEFT DoRA", _DORA, peft("dora"), by_default=_full_layer_or_lead),
    _peer("peft-dora-half", f"PEFT DoRA, {_HALF}", _DORA, peft("dora"), half=True),
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
        fused(FusedBoraLinear, True),
        levels=("layer",),
    ),
    _ours("peft-bora", "BoraConfig in PEFT", _BORA, peft("bora"), levels=("model",), library="peft"),
    _ours("fused-bora-merged", "FusedBoraLinear, merged", _BORA, _fused_bora, modes=("inference",), merged=True),
]
_reusing = functools.partial(_ours, modes=("step", "inference"), scope=bora_kernels.reuse_scales)
PROVIDERS += [  # a step after another one with the same adapter
    _reusing("fused-dora-reused", "FusedDoraLinear, detached, scales reused", _DORA, _fused_dora, levels=("layer",)),
    _reusing("fused-bora-reused", "FusedBoraLinear, scales reused", _BORA, _fused_bora, by_default=_full_layer),
]
PROVIDERS += [  # whole blocks, after fuse
    _blocks("peft-lora-fuse", "PEFT LoRA after fuse", _LORA, after_fuse(peft("lora")), library="peft"),
    _blocks("peft-dora-fuse", "PEFT DoRA after fuse", _DORA, after_fuse(peft("dora")), library="peft"),
    _blocks("fused-bora-fuse", "FusedBoraLinear after fuse", _BORA, after_fuse(_fused_bora)),
]
PROVIDERS += [
    _liger("frozen-liger", "frozen, Liger", _NONE, with_liger(dense(_NONE)), charted=True),
    _liger("peft-lora-liger", "PEFT LoRA, Liger", _LORA, with_liger(peft("lora")), library="peft"),
    _liger(
        "lora-by-hand-liger",
        f"LoRA, fused by hand, {_HALF}, Liger",
        _LORA,
        with_liger(by_hand),
        half=True,
        charted=True,
    ),
    _liger("peft-dora-liger", "PEFT DoRA, Liger", _DORA, with_liger(peft("dora")), library="peft"),
    _liger("fused-bora-liger", "FusedBoraLinear, Liger", _BORA, with_liger(_fused_bora), charted=True),
    _liger("fused-bora-liger-fuse", "FusedBoraLinear after fuse, Liger's rotation", _BORA, after_fuse(_fused_bora)),
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
_eager = {provider.name: provider for provider in PROVIDERS}
PROVIDERS += [  # whole models under torch.compile, where compiling takes most of the time
    dataclasses.replace(
        _eager[name],
        name=f"{name}-compiled",
        title=f"{_eager[name].title}, torch.compile",
        adapt=compiled(_eager[name].adapt),
        levels=("model",),
        modes=("step",),
        bases=("dense",),
        charted=False,
        compiled=True,
        by_default=lambda case: False,
    )
    for name in (  # the longest last
        "frozen",
        "lora-by-hand-half",
        "fused-bora-fuse",
        "fused-bora",
        "peft-dora-fuse",
        "peft-lora-fuse",
        "peft-dora-half",
    )
]
