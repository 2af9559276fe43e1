"""What a stage does, noted as it runs: the memory that it takes with ``empty`` and what it launches with ``launch``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

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


def record(function: Callable[..., tuple], tensors: tuple, options: dict) -> tuple[Recording, tuple]:
    """Run a stage; returns what it did, and its results."""
    outer, recording = getattr(_thread, "recording", None), Recording()
    _thread.recording = recording
    try:
        return recording, function(*tensors, **options)
    finally:
        _thread.recording = outer
