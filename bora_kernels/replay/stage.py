"""Launches, and stages of launches that run as Python once and are replayed from then on.

A layer's step is some 16 launches and 30 allocations. Through Triton's call (11 to 40 µs each) and PyTorch's (5 µs)
they take more host time than most of the kernels run. A function under ``@stage`` is therefore recorded when it is
first called with tensors of given shapes, strides, dtypes and alignments: what it allocates with ``empty`` and what it
launches with ``launch``. A replay allocates the results, and one workspace for all else, writes the addresses where the
recorded parameters point to, and hands the kernels to the driver.

So a stage consists of ``empty``, ``launch``, views of tensors and other stages only, and depends on nothing but its
key: the shapes, strides, dtypes, alignments and devices of its tensors, and its options. It writes to nothing but what
it allocates; one of a single launch, which runs once or not at all, may write over a tensor that it is given. A stage
that another one calls is a part of that one's recording.

A stage runs as Python, every time, on AMD GPUs and where the user wants it (``switch``), while hooks watch Triton's
launches, and with a warning where anything that a replay relies on is missing, refused or not as expected here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import switch
from .cache import Entry, plan_cache
from .compiled import hooked
from .compiling import compile_stage
from .plan import Plan
from .recording import extent, in_a_stage, record

_LOWEST_ADDRESS = 1 << 32  # tensors whose memory was freed lie at 0, or as far from it as in their storage


def stage(function: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorate ``function(*tensors, **options)``; a tensor may be None, options are hashable.

    It returns a tuple of tensors that it allocated, or None in their place. A caller that knows how all tensors lie
    passes ``prepared``, which stands for all that the key has of them but alignments, and saves looking at them; one of
    the tensors may be given or not.
    """
    plans: dict[tuple, Entry] = {}

    @functools.wraps(function)
    def call(*tensors: Any, prepared: object = None, **options) -> tuple:
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        if min(addresses) < _LOWEST_ADDRESS:
            _check_memory(function, tensors)
        if switch.off or not tensors[0].is_cuda or in_a_stage() or hooked():
            return function(*tensors, **options)
        if prepared is None or functools.reduce(operator.or_, addresses) & 15:
            key = (*[None if tensor is None else _layout(tensor) for tensor in tensors], *options.values())
        else:
            key = (prepared, len(addresses), *options.values())
        plan = plans.get(key)
        if plan is None:
            return _record(function, plans, key, tensors, options)
        try:
            results = plan.replay(addresses)
        except torch.OutOfMemoryError:  # single tensors may fit where one workspace does not
            results = None
        except Exception as problem:
            results = function(*tensors, **options)  # an error that is not the replay's comes again
            _refuse(plans, key, problem)
        return function(*tensors, **options) if results is None else results

    return call


def compiled_with(first: Callable[..., tuple]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate ``plan(results, *tensors, **options)``: what it launches is compiled when the stage ``first`` is.

    So the first step of a training waits for the compiler once, and not again in its backward. ``results`` are those of
    ``first``, whose tensors and options follow; nothing is computed.
    """

    def register(plan: Callable[..., None]) -> Callable[..., None]:
        _compiled_with[first.__wrapped__] = plan  # type: ignore[attr-defined]
        return plan

    return register


_compiled_with: dict[Callable, Callable[..., None]] = {}


def _check_memory(function: Callable, tensors: tuple) -> None:
    """Raise ValueError for a tensor whose memory was freed: a kernel that reads it would end all use of the device."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    for number, tensor in enumerate(tensors):
        if tensor is not None and tensor.numel() and not tensor.untyped_storage().nbytes():
            name = names[number] if number < len(names) else "a tensor of the block"
            raise ValueError(f"{name} must hold {list(tensor.shape)} values, got a tensor whose memory was freed")


def _record(function: Callable, plans: dict, key: tuple, tensors: tuple, options: dict) -> tuple:
    inputs = [tensor for tensor in tensors if tensor is not None]
    if _overlap(inputs):  # an address would not tell which of them a kernel read; others with this key may be apart
        return function(*tensors, **options)
    compile_stage(function, tensors, options, _compiled_with.get(function))
    recording, results = record(function, tensors, options)
    try:
        plan = Plan.of(recording, results, inputs[0].get_device())
    except switch.Unavailable as problem:
        switch.give_up(problem)
    except Exception as problem:
        _refuse(plans, key, problem)
    else:
        plan_cache.add(plans, key, plan)
    return results


def _refuse(plans: dict, key: tuple, problem: Exception) -> None:
    plan_cache.add(plans, key, Entry())
    known = isinstance(problem, switch.Unsupported)
    switch.warn_once(problem if known else f"{type(problem).__name__}: {problem}")


def _layout(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), tensor.data_ptr() & 15


def _overlap(tensors: list[Tensor]) -> bool:
    extents = sorted(extent(tensor) for tensor in tensors)
    return any(end > start for (_, end), (start, _) in zip(extents, extents[1:], strict=False))
