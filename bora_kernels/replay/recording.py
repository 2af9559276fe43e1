"""What a stage does, noted as it runs: the memory that it takes with ``empty`` and what it launches with ``launch``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# .recording: the stage that this thread records, if any; .planner: what takes its launches in their place, if any
_thread = threading.local()

Reference = tuple[int, int]  # a tensor's owner (inputs first, then allocations in order), and the offset in bytes


class Layout(NamedTuple):
    """What a tensor descriptor says of its tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Operand(NamedTuple):
    """A leading argument of a launch: where it lies, None for memory from elsewhere, and the layout of a descriptor."""

    reference: Reference | None
    layout: Layout | None


class Launch(NamedTuple):
    """A recorded launch."""

    compiled: Any  # the kernel
    grid: tuple[int, ...]  # of three
    operands: tuple[Operand | None, ...]  # its leading arguments
    arguments: dict  # the others, by name
    beside: int | None  # the number of the launch that it runs beside, if any


class PlannedLaunch(NamedTuple):
    """A launch that did not happen."""

    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple
    arguments: dict


class Allocation:
    """Memory that a stage took, and whether it still has it: scratch is freed as it is without a recording."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.nbytes = tensor.nbytes
        self.extent = extent(tensor)
        self._storage = StorageWeakRef(tensor.untyped_storage())

    @property
    def alive(self) -> bool:
        return not self._storage.expired()


class Recording:
    """What one run of a stage on these inputs allocated and launched."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs = [extent(tensor) for tensor in inputs]
        self.allocated: list[Allocation] = []
        self.launches: list[Launch] = []
        self.beside: int | None = None

    def locate(self, tensor: Tensor) -> Reference | None:
        """Which input or allocation a tensor lies in, and how far from its start."""
        address = tensor.data_ptr()
        for owner, (start, end) in enumerate(self.inputs):
            if start <= address < end:
                return owner, address - start
        for owner, allocation in enumerate(self.allocated, len(self.inputs)):
            start, end = allocation.extent
            if start <= address < end and allocation.alive:
                return owner, address - start
        return None

    def note(self, compiled: Any, grid: tuple[int, ...], tensors: tuple, arguments: dict) -> None:
        operands = []
        for tensor in tensors:
            if tensor is None or isinstance(tensor, Tensor):
                operands.append(None if tensor is None else Operand(self.locate(tensor), None))
            else:
                layout = Layout(tensor.base.dtype, tuple(tensor.shape), tuple(tensor.strides))
                operands.append(Operand(self.locate(tensor.base), layout))
        self.launches.append(Launch(compiled, (*grid, 1, 1)[:3], tuple(operands), arguments, self.beside))


def extent(tensor: Tensor) -> tuple[int, int]:
    """First and last-but-one address of a tensor's memory."""
    start = tensor.data_ptr()
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (span + 1) * tensor.element_size() if tensor.numel() else start


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory: a result of the stage, or scratch that it needs while it runs."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.allocated.append(Allocation(tensor))
    return tensor


def launch(kernel, grid: tuple[int, ...], tensors: tuple, **arguments) -> None:
    """Launch ``kernel`` on ``tensors``, its leading arguments, and the others by name.

    Each of ``tensors`` is a Tensor, a TensorDescriptor or None.
    """
    planner = getattr(_thread, "planner", None)
    if planner is not None:
        planner.append(PlannedLaunch(kernel, grid, tensors, arguments))
        return
    compiled = kernel[grid](*tensors, **arguments)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.note(compiled, grid, tensors, arguments)


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


def in_a_stage() -> bool:
    """Whether this thread records a stage, or launches go to a planner: what is called in there belongs to it."""
    return getattr(_thread, "recording", None) is not None or getattr(_thread, "planner", None) is not None


class Planner(Protocol):
    """What takes launches that do not happen."""

    def append(self, launch: PlannedLaunch, /) -> None: ...


@contextmanager
def planning(planner: Planner) -> Iterator[None]:
    """Launches of this thread in here do not happen, they go to the planner; results are whatever was in memory."""
    outer, _thread.planner = getattr(_thread, "planner", None), planner
    try:
        yield
    finally:
        _thread.planner = outer


def record(function: Callable[..., tuple], tensors: tuple, options: dict) -> tuple[Recording, tuple]:
    """Run a stage; returns what it did, and its results."""
    recording = Recording([tensor for tensor in tensors if tensor is not None])
    outer, _thread.recording = getattr(_thread, "recording", None), recording
    try:
        return recording, function(*tensors, **options)
    finally:
        _thread.recording = outer
