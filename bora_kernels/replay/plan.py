"""Replays of recorded stages through the CUDA driver; see ``stage`` for what a stage is."""

from __future__ import annotations

import math
import struct
import threading

import torch
from torch import Tensor

from . import driver
from .cache import Entry, plan_cache, ticks
from .compiled import kernel_of
from .device import allocate, current_stream
from .parameters import WORD, Parameters, TensorMap
from .recording import Launch, Recording, Reference, extent
from .switch import Unsupported, warn_once

_LAUNCH_BYTES = 2048  # about what Python's objects for a launch take
_ALIGNMENT = 256  # of scratch in the workspace
_REPLAYS_BEFORE_GRAPH = 3  # a graph takes device memory, which a number of tokens met once does not deserve
_LEAST_OWN_KERNELS = 4  # of a stage with graphs for single sets of addresses: a few parameters are soon set anew
_MOST_OWN_BYTES = 128 << 20  # that it makes: a larger one keeps the device busy for longer than the host
_MOST_OWN, _MOST_MET = 256, 1024  # such graphs of a plan, and sets of addresses that are counted


class _Thread(threading.local):
    device: int | None = None  # whose context a replay of this thread had last


_thread = _Thread()


class Plan(Entry):
    """A stage as a list of launches whose parameters lie in one block of host memory."""

    def __init__(self, results, returned, references, maps, launches, host, workspace_bytes, device_index) -> None:
        super().__init__()
        self.results: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = results  # shape, strides, dtype
        self.returned: list[int | None] = returned  # which result stands at each place of the returned tuple
        self.references: list[Reference] = references  # the addresses at the head of ``host``: a base and an offset
        self.maps: list[TensorMap] = maps  # one for each descriptor that a kernel takes
        # (geometry, pointers to the parameters, numbers before, how it is launched if it is dependent, the compiled
        # kernel, which is kept alive: it owns the function)
        self.launches: list[tuple] = launches
        self.host = host
        self.write_addresses = struct.Struct(f"<{len(references)}Q").pack_into
        self.workspace_bytes = workspace_bytes
        self.device_index = device_index
        self.lock = threading.Lock()
        self.bases: list[int] | None = None  # what ``host`` was written for
        self.replays = 0
        self.makes_graph = True  # until the driver refused one
        self.graph = None  # made when the plan has proved to be in use, outside of a capture
        self.graph_is_current = False  # whether the graph has taken what ``host`` holds
        self.met: dict[int, int] = {}  # how often a set, by its hash, would have had a graph take addresses anew
        made = sum(math.prod(shape) * dtype.itemsize for shape, _, dtype in results) + workspace_bytes
        self.makes_own = len(launches) >= _LEAST_OWN_KERNELS and made <= _MOST_OWN_BYTES
        self.nbytes = Entry.nbytes + host.nbytes + _LAUNCH_BYTES * len(launches)

    @classmethod
    def of(cls, recording: Recording, results: tuple[Tensor | None, ...], device_index: int) -> Plan:
        """The recorded stage; Unsupported where a replay is not known to do the same."""
        returned = [None if result is None else _allocation(result, recording) for result in results]
        layouts = {n: _layout(result) for n, result in zip(returned, results, strict=True) if result is not None}
        made = sorted({number for number in returned if number is not None})
        first, workspace = len(recording.inputs), len(recording.inputs) + len(made)
        bases = {owner: owner for owner in range(first)} | {first + number: first + i for i, number in enumerate(made)}

        parameters = Parameters()
        lives: dict[int, tuple[int, int]] = {}  # scratch -> its first and last launch
        launches = []
        for launch, (before, together) in zip(recording.launches, _order(recording.launches), strict=True):
            for operand in launch.operands:
                owner = None if operand is None or operand.reference is None else operand.reference[0]
                if owner is not None and owner not in bases:
                    life = lives.get(owner, together)
                    lives[owner] = min(life[0], together[0]), max(life[1], together[1])
            kernel = kernel_of(launch.compiled)
            places = parameters.of_launch(kernel, launch.operands, launch.arguments)
            launches.append((kernel, launch.grid, places, before))
        scratch = {owner: (recording.allocated[owner - first].nbytes, *life) for owner, life in lives.items()}
        offsets, workspace_bytes = _pack(scratch)

        def place(reference: Reference) -> Reference:
            owner, offset = reference
            return (workspace, offsets[owner] + offset) if owner in offsets else (bases[owner], offset)

        host = parameters.lay_out(place)
        ready = []
        for kernel, grid, places, before in launches:
            geometry = (kernel.function, *grid, kernel.threads, 1, 1, kernel.shared)
            pointers = parameters.pointers(places)
            dependent = driver.DependentLaunch(geometry, pointers) if kernel.dependent else None
            ready.append((geometry, pointers, before, dependent, kernel.compiled))
        return cls(
            [layouts[number] for number in made],
            [None if number is None else made.index(number) for number in returned],
            parameters.references,
            parameters.maps,
            ready,
            host,
            workspace_bytes,
            device_index,
        )

    def replay(self, bases: list[int]) -> tuple[Tensor | None, ...]:
        """Run the stage on inputs at these addresses (those that are not None, in order)."""
        made = [allocate(*result) for result in self.results]
        bases += [tensor.data_ptr() for tensor in made]
        if self.workspace_bytes:
            workspace = allocate((self.workspace_bytes,), (1,), torch.uint8)
            bases.append(workspace.data_ptr())
        stream = current_stream(self.device_index)
        if _thread.device != self.device_index:
            driver.ensure_context(self.device_index)
            _thread.device = self.device_index
        with self.lock:
            self.last_used = next(ticks)
            self.replays += 1
            as_graph = self.makes_graph and self.replays >= _REPLAYS_BEFORE_GRAPH
            if not as_graph or torch.cuda.is_current_stream_capturing():
                self._write(bases)
                self._launch_kernels(stream)
            else:
                try:
                    self._launch_graph(bases, stream)
                except driver.DriverError as error:
                    self._write(bases)
                    self._launch_kernels(stream)  # an error that is not the graph's comes again
                    self.makes_graph = False
                    plan_cache.drop_graph(self)
                    warn_once(f"they go to the device one by one, not as a CUDA graph, since {error}")
        return tuple([None if index is None else made[index] for index in self.returned])

    def _launch_kernels(self, stream: int) -> None:
        launch_kernel = driver.cuda().cuLaunchKernel
        for geometry, pointers, _, dependent, _ in self.launches:
            if dependent is not None:
                dependent(stream)
            elif status := launch_kernel(*geometry, stream, pointers, None):
                driver.check(status, "cuLaunchKernel")

    def _write(self, bases: list[int]) -> None:
        """Write the parameters for tensors at these addresses."""
        if bases == self.bases:
            return
        self.bases, self.graph_is_current = None, False  # should writing fail, ``host`` is of no use
        self.write_addresses(self.host, 0, *[bases[base] + offset for base, offset in self.references])
        for tensor_map in self.maps:
            base, offset = tensor_map.reference
            WORD.pack_into(self.host, tensor_map.offset, bases[base] + offset)
        self.bases = bases

    def _launch_graph(self, bases: list[int], stream: int) -> None:
        if self.own and (own := self.own.get(tuple(bases))) is not None:
            own.launch(stream)
            return
        self._write(bases)
        graph = self.graph  # the cache may take it away at any time
        if graph is None:
            graph = driver.Graph([launch[:3] for launch in self.launches])
            plan_cache.add_graph(self, graph)
        elif not self.graph_is_current:
            if self.makes_own and self._recurs(bases) and (own := self._own_graph(bases)) is not None:
                own.launch(stream)
                return
            graph.update()
        self.graph_is_current = True
        graph.launch(stream)

    def _own_graph(self, bases: list[int]) -> driver.Graph | None:
        """A graph for these addresses, for which ``host`` was written; None where the device has no memory for it."""
        try:
            graph = driver.Graph([launch[:3] for launch in self.launches])
        except driver.DriverError:
            self.makes_own = False
            return None
        plan_cache.add_graph(self, graph, tuple(bases))
        return graph

    def _recurs(self, bases: list[int]) -> bool:
        """Whether these addresses were met so often that they deserve a graph, and there is room for one."""
        if len(self.met) >= _MOST_MET:
            self.met.clear()
        key = hash(tuple(bases))
        self.met[key] = times = self.met.get(key, 0) + 1
        return times >= _REPLAYS_BEFORE_GRAPH and len(self.own) < _MOST_OWN and plan_cache.has_room(driver.Graph.nbytes)


def _order(launches: list[Launch]) -> list[tuple[list[int], tuple[int, int]]]:
    """For each launch the numbers of those it waits for, and the first and last that may run at the same time."""
    order: list[tuple[list[int], tuple[int, int]]] = []
    ends: list[int] = []  # what the next launch waits for
    for number, launch in enumerate(launches):
        if launch.beside is None:
            before, ends, together = ends, [number], (number, number)
        else:
            opens = launches[number - 1].beside is None
            before = order[launch.beside][0] if opens else [number - 1]
            ends, together = [launch.beside, number], (launch.beside, number)
            for other in range(launch.beside, number):
                order[other] = order[other][0], together
        order.append((before, together))
    return order


def _allocation(result: Tensor, recording: Recording) -> int:
    """The number of the allocation that a stage returned, as it is or in another shape."""
    for number, allocation in enumerate(recording.allocated):
        if allocation.tensor() is result:
            return number
    if result.is_contiguous():
        for number, allocation in enumerate(recording.allocated):
            if allocation.alive and allocation.extent == extent(result):
                return number
    raise Unsupported("a stage returned a tensor that is not from `empty`")


def _layout(result: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(result.shape), result.stride(), result.dtype


def _pack(lives: dict[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Offsets in a workspace for tensors of (bytes, first use, last use): those in use together do not overlap.

    The largest come first, so that small ones leave no gaps between them.
    """
    offsets: dict[int, int] = {}
    for key, (size, first, last) in sorted(lives.items(), key=lambda item: -item[1][0]):
        blocked = sorted(
            (offsets[other], offsets[other] + lives[other][0])
            for other in offsets
            if lives[other][1] <= last and first <= lives[other][2]
        )
        offset = 0
        for start, end in blocked:
            if offset + size <= start:
                break
            offset = max(offset, -(-end // _ALIGNMENT) * _ALIGNMENT)
        offsets[key] = offset
    return offsets, max((offsets[key] + lives[key][0] for key in offsets), default=0)
