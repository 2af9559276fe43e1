"""Replays of recorded stages through the CUDA driver; see ``launch`` for what a stage is."""

from __future__ import annotations

import struct
import threading

import torch
from torch import Tensor
from triton.runtime import driver as triton_driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import driver
from .parameters import WORD, Parameters, Reference, TensorMap
from .recording import Launch, Recording, allocate

_ALIGNMENT = 256  # of scratch in the workspace
_REPLAYS_BEFORE_GRAPH = 3  # a graph takes device memory, which a number of tokens met once does not deserve


class Plan:
    """A stage as a list of launches whose parameters lie in one block of host memory."""

    def __init__(self, results, returned, references, maps, launches, host, workspace_bytes, device_index) -> None:
        self.results: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = results  # shape, strides, dtype
        self.returned: list[int | None] = returned  # which result stands at each place of the returned tuple
        self.references: list[Reference] = references  # the addresses at the head of ``host``
        self.maps: list[TensorMap] = maps  # one for each descriptor that a kernel takes
        self.launches: list[tuple] = launches  # (geometry, pointers to the parameters, numbers before, compiled kernel)
        self.host = host
        self.write_addresses = struct.Struct(f"<{len(references)}Q").pack_into
        self.workspace_bytes = workspace_bytes
        self.device_index = device_index
        self.lock = threading.Lock()
        self.bases: list[int] | None = None  # what ``host`` was written for
        self.replays = 0
        self.graph: driver.Graph | None = None  # made when the plan has proved to be in use, outside of a capture
        self.graph_is_current = False  # whether the graph has taken what ``host`` holds

    @classmethod
    def of(cls, recording: Recording, inputs: list[Tensor], results: tuple[Tensor | None, ...]) -> Plan | None:
        """The recorded stage, or None where a replay is not known to do the same."""
        made = [tensor for tensor in recording.allocated if any(tensor is result for result in results)]
        scratch = [tensor for tensor in recording.allocated if all(tensor is not result for result in results)]
        owners = [*inputs, *made, *scratch]
        if any(result is not None and all(result is not tensor for tensor in made) for result in results):
            raise RuntimeError("a stage returned a tensor that is not from `empty`")
        if _overlap(inputs):
            return None  # an address would not tell which of them a kernel read

        parameters = Parameters()
        lives: dict[int, tuple[int, int]] = {}  # scratch tensor -> its first and last launch
        launches = []
        order = _order(recording.launches)
        for launch, (before, together) in zip(recording.launches, order, strict=True):
            located = []
            for tensor in launch.tensors:
                base = tensor.base if isinstance(tensor, TensorDescriptor) else tensor
                place = None if base is None else _locate(base, owners)
                located.append(place)
                if place is not None and place[0] >= len(owners) - len(scratch):
                    life = lives.get(place[0], together)
                    lives[place[0]] = min(life[0], together[0]), max(life[1], together[1])
            pointers = parameters.of_launch(launch.compiled, launch.tensors, located, launch.arguments)
            if pointers is None:
                return None
            launches.append((launch.compiled, launch.grid, pointers, before))

        first_scratch = len(inputs) + len(made)
        offsets, workspace_bytes = _pack({i: (owners[i].nbytes, *lives[i]) for i in lives})

        def base_of(reference: Reference) -> Reference:
            owner, offset = reference
            return (first_scratch, offsets[owner] + offset) if owner in offsets else reference

        host = parameters.lay_out(base_of)
        for tensor_map in parameters.maps:
            if not tensor_map.encode(host):
                return None
        return cls(
            [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in made],
            [None if result is None else next(i for i, t in enumerate(made) if t is result) for result in results],
            [base_of(reference) for reference in parameters.references],
            parameters.maps,
            [
                (
                    (compiled.function, *grid, 32 * compiled.metadata.num_warps, 1, 1, compiled.metadata.shared),
                    parameters.pointers(pointers),
                    before,
                    compiled,  # kept alive: it owns the function
                )
                for compiled, grid, pointers, before in launches
            ],
            host,
            workspace_bytes,
            inputs[0].device.index,
        )

    def replay(self, bases: list[int]) -> tuple[Tensor | None, ...]:
        """Run the stage on inputs at these addresses (those that are not None, in order)."""
        made = [allocate(*result) for result in self.results]
        bases += [tensor.data_ptr() for tensor in made]
        if self.workspace_bytes:
            workspace = allocate((self.workspace_bytes,), (1,), torch.uint8)
            bases.append(workspace.data_ptr())
        stream = triton_driver.active.get_current_stream(self.device_index)
        with self.lock:
            moved = bases != self.bases
            if moved:
                self.write_addresses(self.host, 0, *[bases[base] + offset for base, offset in self.references])
                for tensor_map in self.maps:
                    base, offset = tensor_map.reference
                    WORD.pack_into(self.host, tensor_map.offset, bases[base] + offset)
                self.bases = bases
            self.replays += 1
            if self.replays < _REPLAYS_BEFORE_GRAPH or torch.cuda.is_current_stream_capturing():
                for geometry, pointers, *_ in self.launches:
                    driver.check(driver.cuda().cuLaunchKernel(*geometry, stream, pointers, None), "cuLaunchKernel")
                self.graph_is_current = self.graph_is_current and not moved
            else:
                if self.graph is None:
                    self.graph = driver.Graph([launch[:3] for launch in self.launches])
                elif moved or not self.graph_is_current:
                    self.graph.update()
                self.graph_is_current = True
                self.graph.launch(stream)
        return tuple([None if index is None else made[index] for index in self.returned])


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


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last-but-one address of a tensor's memory."""
    start = tensor.data_ptr()
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (span + 1) * tensor.element_size() if tensor.numel() else start


def _overlap(tensors: list[Tensor]) -> bool:
    extents = sorted(_extent(tensor) for tensor in tensors)
    return any(end > start for (_, end), (start, _) in zip(extents, extents[1:], strict=False))


def _locate(tensor: Tensor, owners: list[Tensor]) -> Reference:
    address = tensor.data_ptr()
    for index, owner in enumerate(owners):
        start, end = _extent(owner)
        if start <= address < end:
            return index, address - start
    raise RuntimeError("a stage launched a kernel on memory that is neither its input nor from `empty`")


def _pack(lives: dict[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Offsets in a workspace for tensors of (bytes, first use, last use): those in use together do not overlap."""
    offsets: dict[int, int] = {}
    for key, (size, first, last) in lives.items():
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
