"""The few calls of the CUDA driver that replays need, through ctypes."""

from __future__ import annotations

import ctypes
import functools
import weakref

_POINTER, _UNSIGNED = ctypes.c_void_p, ctypes.c_uint

# What cuLaunchKernel takes before the stream: function, grid (3), block (3), bytes of shared memory.
Geometry = tuple[int, int, int, int, int, int, int, int]


@functools.lru_cache
def cuda() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernel.argtypes = [_POINTER, *[_UNSIGNED] * 7, _POINTER, _POINTER, _POINTER]
    library.cuTensorMapEncodeTiled.argtypes = [
        _POINTER, _UNSIGNED, _UNSIGNED, _POINTER, *[_POINTER] * 4, *[_UNSIGNED] * 4,
    ]  # fmt: skip
    library.cuFuncGetParamInfo.argtypes = [_POINTER, ctypes.c_size_t, _POINTER, _POINTER]
    library.cuGraphCreate.argtypes = [_POINTER, _UNSIGNED]
    library.cuGraphAddKernelNode_v2.argtypes = [_POINTER, _POINTER, _POINTER, ctypes.c_size_t, _POINTER]
    library.cuGraphInstantiateWithFlags.argtypes = [_POINTER, _POINTER, ctypes.c_ulonglong]
    library.cuGraphExecKernelNodeSetParams_v2.argtypes = [_POINTER] * 3
    library.cuGraphLaunch.argtypes = [_POINTER, _POINTER]
    return library


def check(status: int, call: str) -> None:
    """Raise RuntimeError if a call of the driver failed."""
    if status:
        name = ctypes.c_char_p()
        cuda().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{call} failed: {(name.value or b'error').decode()} ({status})")


def parameter_sizes(function: int) -> list[int] | None:
    """Bytes of each of a kernel's parameters; None where the driver is too old to tell."""
    if not hasattr(cuda(), "cuFuncGetParamInfo"):
        return None
    sizes, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
    while cuda().cuFuncGetParamInfo(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
        sizes.append(size.value)
    return sizes


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS"""

    _fields_ = [
        ("function", _POINTER),
        *[(name, _UNSIGNED) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")],
        ("parameters", _POINTER),
        ("extra", _POINTER),
        ("kernel", _POINTER),
        ("context", _POINTER),
    ]


class Graph:
    """Kernels handed to the device at once: one launch instead of many. Each waits for those that it names by number.

    The driver copies the parameters that ``pointers`` lead to when the graph is made and in ``update``.
    """

    def __init__(self, launches: list[tuple[Geometry, ctypes.Array, list[int]]]) -> None:
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        check(cuda().cuGraphCreate(ctypes.byref(graph), 0), "cuGraphCreate")
        self._nodes = []
        for geometry, pointers, before in launches:
            kernel = _KernelNode(*geometry, ctypes.cast(pointers, _POINTER), None, None, None)
            node = ctypes.c_void_p()
            dependencies = (ctypes.c_void_p * len(before))(*(self._nodes[number][0].value for number in before))
            status = cuda().cuGraphAddKernelNode_v2(
                ctypes.byref(node), graph, dependencies, len(before), ctypes.byref(kernel)
            )
            check(status, "cuGraphAddKernelNode")
            self._nodes.append((node, ctypes.byref(kernel), kernel, pointers))
        status = cuda().cuGraphInstantiateWithFlags(ctypes.byref(self._executable), graph, 0)
        check(status, "cuGraphInstantiate")
        finalizer = weakref.finalize(self, _destroy, graph.value, self._executable.value)
        finalizer.atexit = False  # the driver is gone by then

    def update(self) -> None:
        """Take the parameters as they are now, for launches to come."""
        set_parameters = cuda().cuGraphExecKernelNodeSetParams_v2
        for node, kernel, _, _ in self._nodes:
            check(set_parameters(self._executable, node, kernel), "cuGraphExecKernelNodeSetParams")

    def launch(self, stream: int) -> None:
        check(cuda().cuGraphLaunch(self._executable, stream), "cuGraphLaunch")


def _destroy(graph: int, executable: int) -> None:
    cuda().cuGraphExecDestroy(ctypes.c_void_p(executable))
    cuda().cuGraphDestroy(ctypes.c_void_p(graph))
