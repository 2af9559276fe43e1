"""``save_as_lora``: an adapter as a plain LoRA file, for whatever loads nothing else.

W' − W0 of BoRA or DoRA is not of low rank, since magnitudes scale W0 as well. Its truncated singular value
decomposition is the nearest LoRA, and what that leaves out is measured on the factors as they are written:

    W' − W0 ≈ B·A        B = U·√Σ [N, k]    A = √Σ·Vᵀ [k, K]        error = ‖W' − W0 − B·A‖ / ‖W' − W0‖   (Frobenius)

Source: Eckart and Young, 1936; the subspace iteration is that of Halko, Martinsson and Tropp, arXiv 0909.4061, 4.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _private
from .contents import also_trained, auto_mapping, exact_targets, trained_inside, unwrapped
from .conversion import adapted_layers, adapter_parameters, named_modules
from .files import PREFIX, copies, exact_pattern, write_files

LEAST_ERROR = 1e-6  # that can be asked for: factors are written in float32
_WHOLE = 512  # the shorter axis up to which the whole decomposition is cheap
_FIRST_RANK, _SPARE, _ITERATIONS = 32, 16, 4  # of the search for a rank, and of the subspace iteration


@dataclass(frozen=True)
class LoraLayer:
    """What became of one layer; the norms are Frobenius's."""

    name: str
    shape: tuple[int, int]  # [N, K]; of a convolution [N, K·taps]
    rank: int
    change: float  # ‖W' − W0‖
    lost: float  # ‖W' − W0 − B·A‖
    weight: float  # ‖W0‖

    @property
    def error(self) -> float:
        """What is lost of the change: 0 to 1, and 0 for a layer that did not change."""
        return self.lost / self.change if self.change else 0.0

    def row(self, width: int) -> str:
        """Its line in the table."""
        size = "×".join(map(str, self.shape))
        of_weight = (x / self.weight if self.weight else 0.0 for x in (self.change, self.lost))
        return f"{self.name:{width}}  {size:>12}  {self.rank:5}  {self.error:8.3%}  " + "  ".join(
            f"{share:8.3%}" for share in of_weight
        )


@dataclass(frozen=True)
class LoraReport:
    """All layers of a conversion; ``str`` makes a table."""

    layers: tuple[LoraLayer, ...]

    @property
    def error(self) -> float:
        """What is lost of the change of all layers together."""
        change = math.hypot(*(layer.change for layer in self.layers))
        return math.hypot(*(layer.lost for layer in self.layers)) / change if change else 0.0

    def __str__(self) -> str:
        width = _width([layer.name for layer in self.layers])
        return "\n".join([_head(width), *(layer.row(width) for layer in self.layers), self.foot(width)])

    def foot(self, width: int) -> str:
        """The last line of the table."""
        return f"{'all':{width}}  {'':12}  {max(layer.rank for layer in self.layers):5}  {self.error:8.3%}"


def save_as_lora(
    model: nn.Module,
    path: str | PathLike[str] | None,
    *,
    rank: int | None = None,
    error: float | None = None,
    verbose: bool = True,
) -> LoraReport:
    """Write the adapter of a converted model as LoRA, the nearest of a rank or of an error, for plain PEFT.

        W' − W0 ≈ B·A        error = ‖W' − W0 − B·A‖ / ‖W' − W0‖ of each layer, in Frobenius's norm

    W' − W0 is made in float64, a layer at a time, over a quantized weight from what that stands for; the factors are
    written in float32, the scale in them (alpha is the rank). Layers with another rank than the largest one stand in
    ``rank_pattern`` and ``alpha_pattern``. Other modules that were trained are written as ``modules_to_save``. The
    model stays as it is. Where both axes are far longer than the rank, subspace iteration takes the place of the whole
    decomposition; its error is larger than the least possible by about a hundredth at most.

    Args:
        model: what ``convert`` or ``load_adapter`` returned, merged or not. For a model of PEFT use PEFT's own
            ``save_as_lora`` or ``bora_kernels.integrations.peft.save_as_lora``, which takes convolutions too.
        path: the folder to write; None writes nothing, to look at the table first.
        rank: of all layers; a layer with a shorter axis takes that.
        error: instead of a rank, the largest error of a layer, from 1e-6 to below 1: each takes the smallest rank.
        verbose: print the table, each layer as it is done and before anything is written.

    Returns:
        The ranks and errors of the layers; ``print`` shows the table.

    Raises:
        ValueError: for both or neither of ``rank`` and ``error`` or one out of range, and for a model without adapted
            layers, with an adapted layer in several places (PEFT adapts the first alone), with sharded or not finite
            parameters, or with other trained parameters that PEFT cannot load, or that are an adapted layer's. Nothing
            is written then.
    """
    check_bounds(rank, error)
    model, _ = unwrapped(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            "model must have adapted layers (bora_kernels.convert makes them; for a model of PEFT there is "
            "bora_kernels.integrations.peft.save_as_lora), got none"
        )
    places: dict[nn.Module, str] = {}
    for name, module in named_modules(model, every_place=True):
        if module in layers.values() and places.setdefault(module, name) != name:
            raise ValueError(f"model must have each adapted layer in one place, got {places[module]} as {name} too")
    for name, layer in layers.items():
        for parameter, tensor in adapter_parameters(layer).items():
            if _private.is_wrapper(tensor):
                kind = type(tensor).__name__
                raise ValueError(
                    f"model must hold whole tensors, got a {kind} in {name}.{parameter}: save_adapter(state_dict=…) "
                    "gathers them, and load_adapter puts them into a model that is not sharded"
                )
    others = also_trained(model)
    if nested := [name for name, module in others.items() if any(module.children())]:
        raise ValueError(f"model must train whole modules beside its adapters, got parameters of {nested[0]} itself")
    if inside := trained_inside(layers):
        raise ValueError(f"model must train only the adapters of adapted layers to write LoRA, got {inside[0]} too")
    state = {f"{name}.{key}": t for name, module in others.items() for key, t in module.state_dict().items()}

    changes = ((name, layer.delta_weight(), _norm(layer)) for name, layer in layers.items())
    factors, report = truncate(changes, list(layers), rank, error, verbose)
    if path is None:
        return report
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    tensors |= {PREFIX + name: tensor for name, tensor in state.items()}
    config = {
        "peft_type": "LORA",
        **ranks(report),
        "target_modules": exact_targets(model, layers),
        "modules_to_save": list(others) or None,
        "auto_mapping": auto_mapping(model),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
    }
    write_files(Path(path), copies(tensors), {"format": "pt"}, config)
    return report


def check_bounds(rank: int | None, error: float | None) -> None:
    """ValueError unless one of the two is given and in range."""
    if (rank is None) == (error is None):
        raise ValueError(f"one of rank and error must be given, got rank={rank} and error={error}")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    if error is not None and not LEAST_ERROR <= error < 1:
        raise ValueError(f"error must be in [{LEAST_ERROR}, 1), got {error!r}")


def ranks(report: LoraReport) -> dict[str, Any]:
    """The largest rank, and patterns for the layers that have another; alpha is the rank, so that the scale is 1."""
    rank = max(layer.rank for layer in report.layers)
    pattern = {exact_pattern(layer.name): layer.rank for layer in report.layers if layer.rank != rank}
    return {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def truncate(
    changes: Iterator[tuple[str, Tensor, float]],
    names: Sequence[str],
    rank: int | None,
    error: float | None,
    verbose: bool,
) -> tuple[Mapping[str, tuple[Tensor, Tensor]], LoraReport]:
    """A [k, K] and B [N, k] of each layer on the CPU in float32, of (name, W' − W0, ‖W0‖), and what they leave out."""
    width = _width(names)
    factors, layers = {}, []
    for number, (name, delta, weight) in enumerate(changes):
        if not torch.isfinite(delta).all():
            raise ValueError(f"model must have finite weights, got an adapted weight in {name} that is not")
        A, B = _nearest(delta, rank, error)
        change, lost = delta.norm().item(), (delta - B.to(delta.dtype) @ A.to(delta.dtype)).norm().item()
        layers.append(LoraLayer(name, (delta.shape[0], delta.shape[1]), len(A), change, lost, weight))
        factors[name] = A.cpu(), B.cpu()
        if verbose:
            print(_head(width) + "\n" + layers[-1].row(width) if number == 0 else layers[-1].row(width), flush=True)
    report = LoraReport(tuple(layers))
    if verbose:
        print(report.foot(width), flush=True)
    return factors, report


def _nearest(delta: Tensor, rank: int | None, error: float | None) -> tuple[Tensor, Tensor]:
    """The factors A and B nearest to a matrix [N, K], in float32: of a rank, or of the smallest with an error."""
    short = min(delta.shape)
    tried = min(short, _FIRST_RANK if rank is None else rank)
    while True:
        U, S, Vh = _leading(delta, tried)
        if rank is not None:
            k = tried
            break
        kept = S.square().cumsum(0)
        total = kept[-1] if len(S) == short else delta.square().sum()
        bound = (error or 0.0) ** 2 - (LEAST_ERROR / 3) ** 2  # less what rounding to float32 may add
        k = 1 + int((total - kept > bound * total).sum())
        if k <= tried:
            break
        tried = min(short, 2 * tried)
    root = S[:k].sqrt()
    return (root[:, None] * Vh[:k]).float().contiguous(), (U[:, :k] * root).float().contiguous()


def _leading(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of the largest singular values, ``rank`` of them or more; the same each time."""
    short, width = min(delta.shape), rank + _SPARE
    if short <= _WHOLE or 4 * width >= short:
        return torch.linalg.svd(delta, full_matrices=False)
    start = torch.randn(delta.shape[0], width, generator=torch.Generator().manual_seed(0), dtype=delta.dtype)
    U = start.to(delta.device)
    for _ in range(_ITERATIONS):
        V = torch.linalg.qr(delta.T @ U).Q
        U = torch.linalg.qr(delta @ V).Q
    inner, S, Vh = torch.linalg.svd(U.T @ delta, full_matrices=False)
    return U @ inner, S, Vh


def _norm(layer: Any) -> float:
    return layer._dense_weight().float().norm().item()


def _width(names: Sequence[str]) -> int:
    return max(map(len, (*names, "layer")))


def _head(width: int) -> str:
    lost = "lost of the change; the change and what is lost, of W0"
    return f"{'layer':{width}}  {'weight':>12}   rank  {lost}"
