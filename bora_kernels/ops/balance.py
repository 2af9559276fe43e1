"""float16's narrow range: a power of two that moves between the two scales of a layer.

The magnitude of the axis normalized first is free up to a factor c: with it a and γ grow by c, g shrinks by c, and W'
stays. x⊙g and dy⊙a are float16, which ends at 65504 and has its full precision from 6e-5 on. So the first magnitude is
taken times the power of two that brings a and g near each other, and its gradient too. Layers whose scales are within
a factor of 32 of each other, as at the start of training, keep theirs.

With one magnitude nothing is free: the scale is ‖W'‖ / ‖V‖ line by line, and for x and dy of about 1 it has room from
1e-4 to 1e3. The ranks of a sharded layer take one power: they add up what it is made from, four numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..contract import COMPLETE, Adapter, Completion, Options, given
from .adapted_weight import first_second

_LINES = 32  # of the axis normalized first, whose norms stand for all
_LEAST, _MOST = 3, 60  # exponents


def balanced(
    x: Tensor, weight: Tensor, adapter: Adapter, options: Options, complete: Completion = COMPLETE
) -> tuple[Adapter, Tensor | None]:
    """The adapter with a first magnitude times a power of two [], and that power; None where there is none to take.

    For a shard of a weight ``complete`` is what completes its sums. All ranks call this then, a short shard's too.
    """
    short = options.backend == "dense" and complete is COMPLETE
    if x.dtype != torch.float16 or not all(adapter.members) or short:
        return adapter, None
    with torch.no_grad():
        power = _power(weight, adapter, options, complete)
        return times_power(adapter, power, options), power


def times_power(adapter: Adapter, power: Tensor | None, options: Options) -> Adapter:
    """The adapter with the magnitude of the axis normalized first times a power, in float32."""
    if power is None:
        return adapter
    name = "magnitude_row" if adapter.members.rows_first(options.norm_order) else "magnitude_col"
    return adapter._replace(**{name: given(getattr(adapter, name)).float() * power})


def gradients_of(
    adapter: Adapter, gradients: tuple[Tensor | None, ...], power: Tensor | None, options: Options
) -> tuple[Tensor | None, ...]:
    """Those of x and of this adapter, from those of ``times_power`` of it."""
    if power is None:
        return gradients
    place = 3 if adapter.members.rows_first(options.norm_order) else 4
    gradient, magnitude = gradients[place], given(adapter[place - 1])
    if gradient is None:
        return gradients
    return *gradients[:place], (gradient * power).to(magnitude.dtype), *gradients[place + 1 :]


def _power(weight: Tensor, adapter: Adapter, options: Options, complete: Completion) -> Tensor:
    rows_first = adapter.members.rows_first(options.norm_order)
    m_first, m_second = adapter.magnitudes(rows_first)
    W, P, Q = first_second(weight, adapter, rows_first)
    V = torch.addmm(W[:_LINES].float(), P[:_LINES].float(), Q.float().T, alpha=options.scaling)
    lines, first, second, base = (
        torch.linalg.vector_norm(t, dtype=torch.float32) for t in (m_first[:_LINES], m_first, given(m_second), V)
    )
    complete_first, complete_second = complete if rows_first else reversed(complete)
    if complete_second is not None:  # the axis normalized first is sharded
        lines, first, base = _together(complete_second, lines, first, base)
    elif complete_first is not None:
        second, base = _together(complete_first, second, base)
    # about g / a, of which the power is the square root: ‖m_second‖ / ‖m_first‖ over ‖m_first‖ / ‖V‖
    ratio = second * base / (first * lines)
    exponent = ratio.log2().mul_(0.5).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-_MOST, _MOST)
    exponent = torch.hardshrink(exponent, _LEAST - 0.5).to(torch.int32)
    return exponent.add_(127).bitwise_left_shift_(23).view(torch.float32)  # exact, unlike exp2


def _together(complete: Callable[[Tensor], Tensor], *norms: Tensor) -> tuple[Tensor, ...]:
    """Norms over all shards, from those of this one."""
    return complete(torch.stack(norms).square()).sqrt().unbind()
