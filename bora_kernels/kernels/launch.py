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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_PLANS = 1024  # of a stage: a shape of layer adds one for each number of tokens that it meets; then start anew

_thread = threading.local()  # .recording: the stage that this thread records, if any


try:  # what the code that torch.compile generates allocates with: a third of the time of torch.empty
    from torch._C._dynamo.guards import _empty_strided_cuda as allocate
except ImportError:

    def allocate(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialized memory on the current device."""
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


class Launch(NamedTuple):
    """A recorded launch."""

    compiled: object  # the kernel
    grid: tuple[int, int, int]
    tensors: tuple  # its leading arguments
    arguments: dict  # the others, by name
    beside: int | None  # the number of the launch that it runs beside, if any


class Recording:
    """What one run of a stage allocated and launched."""

    def __init__(self) -> None:
        self.allocated: list[Tensor] = []  # kept alive, so that no two share an address
        self.launches: list[Launch] = []
        self.beside: int | None = None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory: a result of the stage, or scratch that it needs while it runs."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.allocated.append(tensor)
    return tensor


def launch(kernel, grid: tuple[int, ...], tensors: tuple, **arguments) -> None:
    """Launch ``kernel`` on ``tensors``, its leading arguments, and the others by name.

    Each of ``tensors`` is a Tensor, a TensorDescriptor or None.
    """
    compiled = kernel[grid](*tensors, **arguments)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.launches.append(Launch(compiled, (*grid, 1, 1)[:3], tensors, arguments, recording.beside))


@contextmanager
def beside_last_launch() -> Iterator[None]:
    """Launches in here read nothing that the last launch before writes: a graph runs them beside it, one by one.

    What is launched afterwards waits for all of them. Replays without a graph run one launch after the other.
    """
    recording = getattr(_thread, "recording", None)
    if recording is None or not recording.launches or recording.launches[-1].beside is not None:
        yield  # there are two branches at most
        return
    recording.beside = len(recording.launches) - 1
    try:
        yield
    finally:
        recording.beside = None


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
    from .replay import Plan

    outer, recording = getattr(_thread, "recording", None), Recording()
    _thread.recording = recording
    try:
        results = function(*tensors, **options)
    finally:
        _thread.recording = outer
    plan = Plan.of(recording, [tensor for tensor in tensors if tensor is not None], results)
    if plan is not None:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = plan
    return results


@functools.lru_cache
def _replayable(is_cuda: bool) -> bool:
    return is_cuda and torch.version.hip is None
