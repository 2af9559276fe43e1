"""The few calls of the CUDA driver that replays need, through ctypes."""

from __future__ import annotations

import ctypes
import functools
import weakref

from .switch import Unavailable

_POINTER, _UNSIGNED = ctypes.c_void_p, ctypes.c_uint

# What cuLaunchKernel takes before the stream: function, grid (3), block (3), bytes of shared memory.
Geometry = tuple[int, int, int, int, int, int, int, int]

_LIBRARY = "libcuda.so.1"
_CALLS = {
    "cuGetErrorName": [ctypes.c_int, _POINTER],
    "cuCtxGetCurrent": [_POINTER],
    "cuCtxSetCurrent": [_POINTER],
    "cuDeviceGet": [_POINTER, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [_POINTER, ctypes.c_int],
    "cuLaunchKernel": [_POINTER, *[_UNSIGNED] * 7, _POINTER, _POINTER, _POINTER],
    "cuLaunchKernelEx": [_POINTER] * 4,
    "cuTensorMapEncodeTiled": [_POINTER, _UNSIGNED, _UNSIGNED, _POINTER, *[_POINTER] * 4, *[_UNSIGNED] * 4],
    "cuFuncGetParamInfo": [_POINTER, ctypes.c_size_t, _POINTER, _POINTER],  # since CUDA 12.4, the newest of them
    "cuGraphCreate": [_POINTER, _UNSIGNED],
    "cuGraphAddKernelNode_v2": [_POINTER, _POINTER, _POINTER, ctypes.c_size_t, _POINTER],
    "cuGraphInstantiateWithFlags": [_POINTER, _POINTER, ctypes.c_ulonglong],
    "cuGraphExecKernelNodeSetParams_v2": [_POINTER] * 3,
    "cuGraphLaunch": [_POINTER, _POINTER],
    "cuGraphExecDestroy": [_POINTER],
    "cuGraphDestroy": [_POINTER],
}


class DriverError(RuntimeError):
    """A call of the driver failed."""


@functools.lru_cache
def cuda() -> ctypes.CDLL:
    """The driver's library; Unavailable where it, or one of the calls, is missing."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise Unavailable(f"the CUDA driver's library cannot be loaded ({error})") from error
    for name, arguments in _CALLS.items():
        try:
            getattr(library, name).argtypes = arguments
        except AttributeError as error:
            raise Unavailable(f"the CUDA driver has no {name}, it is older than CUDA 12.4") from error
    return library


def check(status: int, call: str) -> None:
    """Raise DriverError if a call of the driver failed."""
    if status:
        name = ctypes.c_char_p()
        cuda().cuGetErrorName(status, ctypes.byref(name))
        raise DriverError(f"{call} failed: {(name.value or b'error').decode()} ({status})")


def ensure_context(device: int) -> None:
    """Give the calling thread the device's primary context, where it has none: no call of CUDA was made in it yet."""
    current = ctypes.c_void_p()
    check(cuda().cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if not current.value:
        check(cuda().cuCtxSetCurrent(_primary_context(device)), "cuCtxSetCurrent")


@functools.lru_cache
def _primary_context(device: int) -> int | None:
    """PyTorch's context on a device, retained as long as the process runs."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(cuda().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    check(cuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    return context.value


def parameter_sizes(function: int) -> list[int]:
    """Bytes of each of a kernel's parameters."""
    sizes: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while cuda().cuFuncGetParamInfo(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
        sizes.append(size.value)
    return sizes


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of those whose value is an int"""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        *[(name, _UNSIGNED) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")],
        ("stream", _POINTER),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", _UNSIGNED),
    ]


class DependentLaunch:
    """A launch that may start before the kernel before it in its stream has ended: that one's programs have all begun.

    The kernel itself waits, with ``griddepcontrol.wait``, before it reads what others wrote.
    """

    _PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID

    def __init__(self, geometry: tuple[int, ...], pointers: ctypes.Array) -> None:  # a Geometry
        self._function, *sizes = geometry
        self._pointers = pointers
        self._attribute = _Attribute(self._PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._config = _LaunchConfig(*sizes, None, ctypes.pointer(self._attribute), 1)

    def __call__(self, stream: int) -> None:
        self._config.stream = stream
        if status := cuda().cuLaunchKernelEx(ctypes.byref(self._config), self._function, self._pointers, None):
            check(status, "cuLaunchKernelEx")


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

    A dependent launch waits as others do: where graphs pay, the host is slower than the device.

    The driver copies the parameters that ``pointers`` lead to when the graph is made and in ``update``. ``nbytes`` is
    about what it takes of a device's memory.
    """

    nbytes = 352 << 10  # measured on an H100, driver 580

    def __init__(self, launches: list[tuple[Geometry, ctypes.Array, list[int]]]) -> None:
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        check(cuda().cuGraphCreate(ctypes.byref(graph), 0), "cuGraphCreate")
        try:
            self._nodes = _add_nodes(graph, launches)
            status = cuda().cuGraphInstantiateWithFlags(ctypes.byref(self._executable), graph, 0)
            check(status, "cuGraphInstantiate")
        except DriverError:
            cuda().cuGraphDestroy(graph)
            raise
        finalizer = weakref.finalize(self, _destroy, graph.value, self._executable.value)
        finalizer.atexit = False  # type: ignore[misc] # a property; the driver is gone by then

    def update(self) -> None:
        """Take the parameters as they are now, for launches to come. Where it raises, some are taken and some not."""
        set_parameters, executable = cuda().cuGraphExecKernelNodeSetParams_v2, self._executable
        for node, kernel, _, _ in self._nodes:
            if status := set_parameters(executable, node, kernel):
                check(status, "cuGraphExecKernelNodeSetParams")

    def launch(self, stream: int) -> None:
        if status := cuda().cuGraphLaunch(self._executable, stream):
            check(status, "cuGraphLaunch")


def _add_nodes(graph: ctypes.c_void_p, launches: list) -> list[tuple]:
    """Kernel nodes in order: the node, its parameters by reference, and what these refer to."""
    nodes: list[tuple] = []
    for geometry, pointers, before in launches:
        kernel = _KernelNode(*geometry, ctypes.cast(pointers, _POINTER), None, None, None)
        node = ctypes.c_void_p()
        dependencies = (ctypes.c_void_p * len(before))(*(nodes[number][0].value for number in before))
        status = cuda().cuGraphAddKernelNode_v2(
            ctypes.byref(node), graph, dependencies, len(before), ctypes.byref(kernel)
        )
        check(status, "cuGraphAddKernelNode")
        nodes.append((node, ctypes.byref(kernel), kernel, pointers))
    return nodes


def _destroy(graph: int | None, executable: int | None) -> None:
    cuda().cuGraphExecDestroy(ctypes.c_void_p(executable))
    cuda().cuGraphDestroy(ctypes.c_void_p(graph))
