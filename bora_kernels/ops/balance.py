"""float16's narrow range: a power of two that moves between the two scales of a layer.

The magnitude of the axis normalized first is free up to a factor c: with it a and γ grow by c, g shrinks by c, and W'
stays. x⊙g and dy⊙a are float16, which ends at 65504 and has its full precision from 6e-5 on. So the first magnitude is
taken times the power of two that brings a and g near each other, and its gradient too. Layers whose scales are within
a factor of 32 of each other, as at the start of training, keep theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Adapter, Options, given
from .adapted_weight import first_second

_LINES = 32  # of the axis normalized first, whose norms stand for all
_LEAST, _MOST = 3, 60  # exponents


def balanced(x: Tensor, weight: Tensor, adapter: Adapter, options: Options) -> tuple[Adapter, Tensor | None]:
    """The adapter with a first magnitude times a power of two [], and that power; None where there is none to take."""
    if x.dtype != torch.float16 or not all(adapter.members) or options.backend == "dense":
        return adapter, None
    rows_first = adapter.members.rows_first(options.norm_order)
    name, other = ("magnitude_row", "magnitude_col") if rows_first else ("magnitude_col", "magnitude_row")
    magnitude = given(getattr(adapter, name))
    with torch.no_grad():
        power = _power(weight, adapter, magnitude, given(getattr(adapter, other)), rows_first, options)
    return adapter._replace(**{name: magnitude.float() * power}), power


def _power(
    weight: Tensor, adapter: Adapter, m_first: Tensor, m_second: Tensor, rows_first: bool, options: Options
) -> Tensor:
    W, P, Q = first_second(weight, adapter, rows_first)
    V = W[:_LINES].float() + options.scaling * (P[:_LINES].float() @ Q.float().T)
    squares = m_first.float().square()  # of the lines of H
    first = _mean_log2(m_first[:_LINES].float() / V.square().sum(1).sqrt())
    second = _mean_log2(m_second.float() / (squares.sum() / len(m_second)).sqrt())
    exponent = ((second - first) / 2).nan_to_num(0.0, 0.0, 0.0).round().clamp(-_MOST, _MOST)
    exponent = torch.where(exponent.abs() < _LEAST, 0, exponent).to(torch.int32)
    return ((exponent + 127) << 23).view(torch.float32)  # exact, unlike exp2


def _mean_log2(scale: Tensor) -> Tensor:
    """The mean exponent of scales that are neither zero nor infinite."""
    exponents = scale.abs().log2()
    counted = exponents.isfinite()
    return torch.where(counted, exponents, 0).sum() / counted.sum()
