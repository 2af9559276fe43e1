"""The gate of an MLP on Triton kernels, as stages: see ``kernels.gated``."""

from __future__ import annotations

from torch import Tensor

from ..contract import Activation
from ..kernels import gated
from ..ops import operators
from ..replay.stage import stage


def gate(e: Tensor, f: Tensor, activation: Activation) -> Tensor:
    """h = act(e)⊙f."""
    with operators.context("triton", e):
        return _gate(e.contiguous(), f.contiguous(), activation=activation)[0]


def gate_backward(dh: Tensor, e: Tensor, f: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """de, written over dh where that is contiguous, and df."""
    dh = dh.contiguous()
    with operators.context("triton", e):
        return dh, _gate_backward(dh, e.contiguous(), f.contiguous(), activation=activation)[0]


@stage
def _gate(e, f, *, activation):
    return (gated.gate(e, f, activation),)


@stage
def _gate_backward(dh, e, f, *, activation):
    return gated.gate_backward(e, f, dh, activation)[1:]
