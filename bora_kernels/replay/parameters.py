"""The parameters of a stage's kernels, in one block of host memory that replays write addresses to.

A kernel that Triton compiled takes its arguments in the order of its signature, without constexprs, and after them two
scratch pointers. A tensor descriptor is a CUtensorMap, two int32 sizes and two int64 strides. The driver's own account
of a kernel's parameters is compared with that before a plan is used, so that another convention is noticed.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch

from . import driver
from .compiled import Kernel
from .recording import Layout, Operand, Reference
from .switch import Unsupported

_SCALAR_FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # of a CUtensorMap
_MAP_DTYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
_MAP_TRIALS = (0x7E5A3C1B9D00, 0x01A5C3E4F600)  # addresses without a common bit pattern, aligned as any tensor here
_L2_PROMOTION_128B = 2  # CUtensorMapL2promotion
WORD = struct.Struct("<Q")


class Parameters:
    """Kernel parameters: addresses that change from replay to replay, tensor maps, and constants."""

    def __init__(self) -> None:
        self.references: list[Reference] = []  # a recording's, and a plan's once they are laid out
        self.maps: list[TensorMap] = []
        self.constants: list[bytes] = []
        self.start = 0  # address of the block in host memory

    def of_launch(self, kernel: Kernel, operands: tuple[Operand | None, ...], arguments: dict) -> list[tuple]:
        """(kind, index) for each parameter of a kernel; Unsupported if the kernel takes others than are expected."""
        places = dict(zip(kernel.names, operands, strict=False))
        maps = iter(kernel.maps)
        found, sizes = [], []
        for name, kind in kernel.kinds.items():
            if isinstance(kind, str) and (kind.startswith("*") or kind.startswith("tensordesc")):
                operand = places[name]
                if operand is None or operand.reference is None:
                    raise Unsupported("a stage launched a kernel on memory that is neither its input nor from `empty`")
                reference, layout = operand.reference, operand.layout
                if layout is None:
                    found.append(("address", self._address(reference)))
                    sizes.append(8)
                    continue
                self.maps.append(TensorMap(layout, reference, next(maps)))
                found.append(("map", len(self.maps) - 1))
                sizes.append(_MAP_BYTES)
                for value, format in zip((*layout.shape, *layout.strides), "iiqq", strict=True):
                    found.append(self._constant(struct.pack(f"<{format}", value)))
                    sizes.append(struct.calcsize(f"<{format}"))
            elif kind in _SCALAR_FORMATS:
                found.append(self._constant(struct.pack(_SCALAR_FORMATS[kind], arguments[name])))
                sizes.append(struct.calcsize(_SCALAR_FORMATS[kind]))
            else:
                raise Unsupported(f"a kernel takes a parameter of a kind that replays do not know, {kind}")
        for _ in range(2):  # scratch pointers
            found.append(self._constant(bytes(8)))
            sizes.append(8)
        actual = driver.parameter_sizes(kernel.function)
        if actual != sizes:
            raise Unsupported(f"a kernel takes parameters of {actual} bytes, where replays expect {sizes}")
        return found

    def _address(self, reference: Reference) -> int:
        if reference not in self.references:
            self.references.append(reference)
        return self.references.index(reference)

    def _constant(self, value: bytes) -> tuple[str, int]:
        self.constants.append(value.ljust(8, b"\0"))
        return "constant", len(self.constants) - 1

    def lay_out(self, place: Callable[[Reference], Reference]) -> memoryview:
        """Allocate the block and write everything but the addresses; returns it from its first address on.

        ``place`` turns what a recording refers to into one of the plan's bases and an offset.
        """
        words = len(self.references) + len(self.constants)
        self.first_map = -(-8 * words // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        size = self.first_map + _MAP_BYTES * len(self.maps)
        block = ctypes.create_string_buffer(size + _MAP_ALIGNMENT)
        skipped = -ctypes.addressof(block) % _MAP_ALIGNMENT
        self.start = ctypes.addressof(block) + skipped
        host = memoryview(block).cast("B")[skipped : skipped + size]
        for index, value in enumerate(self.constants):
            host[self._offset("constant", index) :][:8] = value
        self.references = [place(reference) for reference in self.references]
        for index, tensor_map in enumerate(self.maps):
            tensor_map.reference = place(tensor_map.reference)
            tensor_map.offset = self._offset("map", index)
            if not tensor_map.encode(host):
                raise Unsupported("the CUDA driver's tensor maps hold an address in a form that replays do not know")
        return host

    def _offset(self, kind: str, index: int) -> int:
        if kind == "map":
            return self.first_map + _MAP_BYTES * index
        return 8 * (index if kind == "address" else len(self.references) + index)

    def pointers(self, parameters: list[tuple]) -> ctypes.Array:
        """What cuLaunchKernel takes: where each parameter lies."""
        addresses = [self.start + self._offset(*parameter) for parameter in parameters]
        return (ctypes.c_void_p * len(addresses))(*addresses)


class TensorMap:
    """A CUtensorMap in a plan's host memory. Its layout is the driver's own, but for where the address lies in it."""

    def __init__(self, layout: Layout, reference: Reference, metadata: dict) -> None:
        self.reference, self.offset = reference, 0
        rows, cols = layout.shape
        block_rows, block_cols = metadata["block_size"]
        self.before = (_MAP_DTYPES[layout.dtype], 2)
        self.after = (
            (ctypes.c_uint64 * 2)(cols, rows),
            (ctypes.c_uint64 * 1)(layout.strides[0] * layout.dtype.itemsize),
            (ctypes.c_uint32 * 2)(block_cols, block_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            0,  # no interleaving
            metadata["swizzle"],
            _L2_PROMOTION_128B,
            0,  # zeros outside the bounds
        )

    def encode(self, host: memoryview) -> bool:
        """Write the map to ``host``, and let ``offset`` be where in it the address goes; False if it goes elsewhere.

        To move a tensor one word is written then, instead of a call of the driver.
        """
        first, second = (self._encoded(address) for address in _MAP_TRIALS)
        place = first.find(WORD.pack(_MAP_TRIALS[0]))
        moved = first[:place] + WORD.pack(_MAP_TRIALS[1]) + first[place + WORD.size :]
        if place < 0 or moved != second:
            return False
        host[self.offset : self.offset + _MAP_BYTES] = first
        self.offset += place
        return True

    def _encoded(self, address: int) -> bytes:
        block = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        skipped = -ctypes.addressof(block) % _MAP_ALIGNMENT
        location = ctypes.addressof(block) + skipped
        driver.check(
            driver.cuda().cuTensorMapEncodeTiled(location, *self.before, address, *self.after), "cuTensorMapEncodeTiled"
        )
        return block.raw[skipped : skipped + _MAP_BYTES]
