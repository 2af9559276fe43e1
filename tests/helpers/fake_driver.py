"""The CUDA driver played by Python on CPU memory, and a kernel that it runs: y = scale·a + b."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np

SIZES = {"i32": 4, "i64": 8, "fp32": 4}
TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Kernel:
    """Stands in for a kernel: y[i] = scale·a[i] + b[i] on the addresses that a launch hands over."""

    arg_names = ("a_ptr", "b_ptr", "y_ptr", "n", "scale", "ONE")

    def __init__(self, driver, sizes=None, **metadata):
        usual = {"num_warps": 4, "shared": 0, "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
        self.metadata = SimpleNamespace(**(usual | {"global_scratch_size": 0, "profile_scratch_size": 0} | metadata))
        self.driver, self.sizes = driver, sizes

    def __getitem__(self, grid):
        def run(*tensors, n, scale, ONE):  # noqa: N803
            add_scaled(*(None if t is None else t.data_ptr() for t in tensors), n, scale)
            kinds = ["constexpr" if t is None else "*fp32" for t in tensors] + ["i32", "fp32", "constexpr"]
            return Compiled(self, dict(zip(self.arg_names, kinds, strict=True)))

        return run


class Compiled:
    """One variant of the kernel, as Triton hands it out and as the driver runs it."""

    def __init__(self, kernel, signature):
        self.src, self.metadata = SimpleNamespace(fn=kernel, signature=signature), kernel.metadata
        kinds = [kind for kind in signature.values() if kind != "constexpr"]
        self.sizes = kernel.sizes or [8 if kind.startswith("*") else SIZES[kind] for kind in kinds] + [8, 8]
        self.function = len(kernel.driver.kernels)
        kernel.driver.kernels.append(self)

    def launch(self, pointers):
        add_scaled(*self.values(pointers))

    def values(self, pointers):
        """The arguments as the driver reads them when it is called."""
        values, given = [], iter(range(len(self.sizes)))
        for kind in self.src.signature.values():
            type_ = ctypes.c_uint64 if kind.startswith("*") else TYPES.get(kind)
            values.append(type_ and type_.from_address(pointers[next(given)]).value)
        return values[:5]


def add_scaled(a, b, y, n, scale):
    a, b, y = (None if at is None else np.ctypeslib.as_array((ctypes.c_float * n).from_address(at)) for at in (a, b, y))
    y[:] = np.float32(scale) * a + (0 if b is None else b)


class Driver:
    """What ``driver`` asks of the CUDA library: kernels and graphs, run by Python."""

    def __init__(self):
        self.kernels, self.launches, self.status, self.capturing = [], [], 0, False
        self.graphs, self.updates = [], 0
        self.waits = []  # for each node the nodes that it waits for

    def cuLaunchKernel(self, function, *rest):  # noqa: N802
        *geometry, stream, pointers, extra = rest
        self.launches.append((function, tuple(geometry), stream))
        if not self.status:
            self.kernels[function].launch(pointers)
        return self.status

    def cuGetErrorName(self, status, name):  # noqa: N802
        return 0

    def cuGraphCreate(self, graph, flags):  # noqa: N802
        self.graphs.append([])
        graph._obj.value = len(self.graphs)
        return 0

    def cuGraphAddKernelNode_v2(self, node, graph, before, count, kernel):  # noqa: N802
        nodes = self.graphs[graph.value - 1]
        self.waits.append([before[index] - 1 for index in range(count)])
        nodes.append(None)
        node._obj.value = len(nodes)
        return self.cuGraphExecKernelNodeSetParams_v2(graph, node._obj, kernel, made=True)

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):  # noqa: N802
        executable._obj.value = graph.value
        return 0

    def cuGraphExecKernelNodeSetParams_v2(self, executable, node, kernel, made=False):  # noqa: N802
        self.updates += not made
        compiled = self.kernels[kernel._obj.function or 0]
        taken = compiled.values(ctypes.cast(kernel._obj.parameters, ctypes.POINTER(ctypes.c_void_p)))
        self.graphs[executable.value - 1][node.value - 1] = (compiled, taken, kernel._obj)
        return 0

    def cuGraphLaunch(self, executable, stream):  # noqa: N802
        for compiled, values, kernel in self.graphs[executable.value - 1] if not self.status else ():
            geometry = tuple(getattr(kernel, name) for name, _ in kernel._fields_[1:8])
            self.launches.append((compiled.function, geometry, stream))
            add_scaled(*values)
        return self.status

    def cuGraphDestroy(self, graph):  # noqa: N802
        return 0

    cuGraphExecDestroy = cuGraphDestroy  # noqa: N815
