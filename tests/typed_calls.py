"""What a type checker makes of users' calls: mypy reads this file with the package in ``make lint``; nothing runs it.

An ignored error that does not occur is an error itself, so that every misspelt call below has to be one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import bora_kernels
from bora_kernels import FusedBoraLinear, FusedColumnLinear, FusedDoraLinear, bora_linear

if TYPE_CHECKING:
    from typing_extensions import assert_type


class Model(nn.Module):
    head: nn.Linear


def results(model: Model, linear: nn.Linear) -> None:
    assert_type(bora_kernels.convert(model), Model)
    assert_type(bora_kernels.convert(model, 8, alpha=16, method="dora", norm_order="col_row", rslora=True), Model)
    assert_type(bora_kernels.convert(nn.Sequential(linear), adapter_dtype=torch.bfloat16), nn.Sequential)
    assert_type(bora_kernels.load_adapter(model, "folder"), Model)
    assert_type(bora_kernels.merge_adapter(model), Model)
    assert_type(bora_kernels.unfuse(bora_kernels.fuse(model)), Model)
    assert_type(FusedBoraLinear.from_linear(linear), FusedBoraLinear)
    assert_type(FusedDoraLinear.from_linear(linear, dropout=0.1), FusedDoraLinear)
    assert_type(FusedColumnLinear.from_linear(linear).lora_A, nn.Parameter)
    assert_type(FusedColumnLinear.from_linear(linear).magnitude_row, nn.Parameter | None)


def layers(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> None:
    assert_type(bora_linear(x, weight, A, B, None, None, scaling=2.0, norm_order="col_row", backend="torch"), Tensor)
    bora_linear(x, weight, A, B, None, None)  # type: ignore[call-arg]
    bora_linear(x, weight, A, B, None, None, scaling=2.0, detach=True)  # type: ignore[call-arg]
    bora_linear(x, weight, A, B, None, None, scaling=2.0, norm_order="columns")  # type: ignore[arg-type]
    bora_linear(x, weight, A, B, None, None, scaling=2.0, backend="cuda")  # type: ignore[arg-type]


def misspelt(model: Model, linear: nn.Linear) -> None:
    bora_kernels.convert(model, alpah=8)  # type: ignore[call-arg]
    bora_kernels.convert(model, rank=8)  # type: ignore[call-arg]
    bora_kernels.convert(model, dropuot=0.1)  # type: ignore[call-arg]
    bora_kernels.convert(model, method="borra")  # type: ignore[arg-type]
    bora_kernels.convert(model, norm_order="row")  # type: ignore[arg-type]
    bora_kernels.convert(model, dropout="0.1")  # type: ignore[arg-type]
    FusedBoraLinear(4, 4, lora_alpha=8)  # type: ignore[call-arg]
    FusedBoraLinear(4, 4, norm_order="cols")  # type: ignore[arg-type]
    FusedDoraLinear.from_linear(linear, alpah=8)  # type: ignore[call-arg]
    FusedBoraLinear.from_linear(linear).backend = "trtion"  # type: ignore[assignment]
