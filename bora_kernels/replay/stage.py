"""Launches, and stages of launches that run as Python once and are replayed from then on.

A layer's step is some 16 launches and 30 allocations. Through Triton's call (11 to 40 µs each) and PyTorch's (5 µs)
they take more host time than most of the kernels run. A function under ``@stage`` is therefore recorded when it is
first called with tensors of given shapes, strides, dtypes and alignments: what it allocates with ``empty`` and what it
launches with ``launch``. A replay allocates the results, and one workspace for all else, writes the addresses where the
recorded parameters point to, and hands the kernels to the driver.

So a stage consists of ``empty``, ``launch`` and views of tensors only, and depends on nothing but its key: the shapes,
strides, dtypes, alignments and device of its tensors, and its options. Where kernels cannot be replayed (Triton's
interpreter, AMD GPUs, kernels whose parameters are not as expected here) a stage runs as Python every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .recording import record

_MOST_PLANS = 1024  # of a stage: a shape of layer adds one for each number of tokens that it meets; then start anew


def stage(function: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorate ``function(*tensors, **options)``; a tensor may be None, options are hashable.

    It returns a tuple of tensors that it allocated, or None in their place. A caller that knows the layout of all
    tensors passes ``prepared``, which stands for it, and saves looking at them; one of the tensors may be given or not.
    """
    plans: dict[tuple, object] = {}

    @functools.wraps(function)
    def call(*tensors: Tensor | None, prepared: object = None, **options) -> tuple:
        if not _replayable(tensors[0].is_cuda):
            return function(*tensors, **options)
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        if prepared is None:
            layouts = [None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors]
            key = (tensors[0].get_device(), *layouts, *options.values())
        else:
            key = (prepared, len(addresses), *options.values())
        plan = plans.get(key)
        if plan is not None:
            return plan.replay(addresses)
        return _record(function, plans, key, tensors, options)

    return call


def _record(function: Callable, plans: dict, key: tuple, tensors: tuple, options: dict) -> tuple:
    from .plan import Plan  # Triton is imported only when it is used

    recording, results = record(function, tensors, options)
    plan = Plan.of(recording, [tensor for tensor in tensors if tensor is not None], results)
    if plan is not None:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = plan
    return results


@functools.lru_cache
def _replayable(is_cuda: bool) -> bool:
    return is_cuda and torch.version.hip is None
