"""float16's narrow range: a power of two that moves between the two scales of a layer.

The magnitude of the axis normalized first is free up to a factor c: with it a and γ grow by c, g shrinks by c, and W'
stays. x⊙g and dy⊙a are float16, which ends at 65504 and has its full precision from 6e-5 on. So the first magnitude is
taken times the power of two that brings a and g near each other, and its gradient too. Layers whose scales are within
a factor of 32 of each other, as at the start of training, keep theirs.

With one magnitude nothing is free: the scale is ‖W'‖ / ‖V‖ line by line, and from 1e-4 to 1e3 it has room. A sharded
layer keeps its magnitudes as they are, since a power would have to be agreed on among the ranks.
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
    V = torch.addmm(W[:_LINES].float(), P[:_LINES].float(), Q.float().T, alpha=options.scaling)
    lines, first, second = (
        torch.linalg.vector_norm(m, dtype=torch.float32) for m in (m_first[:_LINES], m_first, m_second)
    )
    # about g / a, of which the power is the square root: ‖m_second‖ / ‖m_first‖ over ‖m_first‖ / ‖V‖
    ratio = second * torch.linalg.vector_norm(V) / (first * lines)
    exponent = ratio.log2().mul_(0.5).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-_MOST, _MOST)
    exponent = torch.hardshrink(exponent, _LEAST - 0.5).to(torch.int32)
    return exponent.add_(127).bitwise_left_shift_(23).view(torch.float32)  # exact, unlike exp2
