"""The arguments of a call over a sharded weight, checked once for all calls that look alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement

from ... import _private
from ...contract import Adapter, Evaluation, Options, evaluation
from .. import validation
from .layout import check_placements, positive, shard_bounds


class Call(NamedTuple):
    """What a call computes with besides tensors, once its arguments were checked."""

    by_rows: bool
    dtype: torch.dtype  # of x, as autocast makes it
    x_placement: Placement
    y_placement: Placement | None  # None: as the product leaves it
    options: Options  # whose backend is chosen


_calls: dict[tuple, Call] = {}
_MOST_CALLS = 1024


def prepare(
    x: Any,
    weight: DTensor,
    adapter: Adapter,
    bias: Tensor | None,
    options: Options,
    ends: tuple[Placement, Placement] | None,
) -> Call:
    """Check the arguments of a call, whose x is a plain tensor where ``ends`` are given: the placements of x and y.

    For a plain x the answer is remembered. It depends on the options, on kinds and devices, and on what DTensors know
    as their ``_spec``: mesh, placement, shape, strides and dtype.
    """
    key = None
    ends = ends if ends is None else tuple(ends)  # type: ignore[assignment] # it may have come as a list
    if ends is not None and not weight.requires_grad and not torch.compiler.is_compiling():
        kinds = [None if t is None else (_private.of_dtensor(t, "_spec"), t.device) for t in (weight, *adapter, bias)]
        if all(kind is None or kind[0] is not None for kind in kinds):
            key = (x.shape[-1:], x.ndim, x.dtype, x.device, validation.autocast_dtype(x), options, ends, *kinds)
            known = _calls.get(key)
            if known is not None:
                return known
    if ends is not None and not (len(ends) == 2 and all(isinstance(end, Placement) for end in ends)):
        raise TypeError(f"placements must be two, of x and of y, got {ends!r}")
    by_rows = check_placements(weight, adapter, bias, x if ends is None else None)
    validation.check_tensors(x, weight, *adapter, bias, sharded=True, part_of_x=ends is not None)
    if options.backend == "reference":
        raise ValueError('backend must be "triton", "torch" or None for a sharded weight, got "reference"')
    dtype = validation.autocast_dtype(x) or x.dtype
    start, end = shard_bounds(weight.shape[0 if by_rows else 1], weight.device_mesh)
    shape = (end - start, weight.shape[1]) if by_rows else (weight.shape[0], end - start)
    backend: Evaluation | None = "torch" if 0 in shape else options.backend  # more ranks than rows or columns
    backend = validation.choose_backend(backend, x.device, dtype, adapter.lora_A.shape[0])
    x_placement, y_placement = (x.placements[0], None) if ends is None else (positive(p, x.ndim) for p in ends)
    call = Call(by_rows, dtype, x_placement, y_placement, options._replace(backend=evaluation(backend, shape)))
    if key is not None:
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        _calls[key] = call
    return call
