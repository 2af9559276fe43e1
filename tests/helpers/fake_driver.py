"""The CUDA driver played by Python on CPU memory, a kernel that it runs, y = scale·a + b, and a stage of these."""

from __future__ import annotations

import ctypes
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import torch

SIZES = {"i32": 4, "i64": 8, "fp32": 4}
TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Kernel:
    """Stands in for a kernel: y[i] = scale·a[i] + b[i] on the addresses that a launch hands over."""

    arg_names = ("a_ptr", "b_ptr", "y_ptr", "n", "scale", "ONE")

    def __init__(self, driver, sizes=None, **metadata):
        usual = {"num_warps": 4, "shared": 0, "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
        self.metadata = SimpleNamespace(**(usual | {"global_scratch_size": 0, "profile_scratch_size": 0} | metadata))
        self.driver, self.sizes = driver, sizes
        self.lost = False  # whether the device is, so that every launch fails

    def __getitem__(self, grid):
        def run(*tensors, n, scale, ONE):  # noqa: N803
            if self.lost:
                raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
            self.driver.context.value = 1  # Triton's call gives its thread one
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
    """What ``driver`` asks of the CUDA library: contexts of threads, kernels and graphs, run by Python.

    ``failing`` has the statuses of calls that fail, by name. A call in a thread without a context does, as on a device.
    """

    def __init__(self):
        self.kernels, self.launches, self.capturing = [], [], False
        self.dependent = []  # numbers of the launches that may start before those before them have ended
        self.failing, self.destroyed = {}, 0
        self.graphs, self.updates = [], 0  # a graph that is destroyed leaves None
        self.waits = []  # for each node the nodes that it waits for
        self.context = threading.local()

    def play(self, monkeypatch):
        """Take the driver's place, and let tensors on the CPU be taken for such on a device; for a fixture."""
        from bora_kernels.replay import driver, plan, plan_cache, stage, switch

        monkeypatch.setattr(plan, "current_stream", lambda index: 7)
        monkeypatch.setattr(plan, "allocate", lambda *args: torch.empty_strided(*args[:2], dtype=args[2]))
        monkeypatch.setattr(driver, "cuda", lambda: self)
        monkeypatch.setattr(driver, "parameter_sizes", lambda function: self.kernels[function].sizes)
        monkeypatch.setattr(stage, "compile_stage", lambda *_: None)  # the kernels here need no compiler
        monkeypatch.setattr(plan, "_thread", plan._Thread())
        monkeypatch.setattr(switch, "_warned", set())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        driver._primary_context.cache_clear()
        yield self
        plan_cache.clear()

    def _status(self, call):
        return self.failing.get(call, 0) or (0 if getattr(self.context, "value", None) else 201)

    def cuCtxGetCurrent(self, context):  # noqa: N802
        context._obj.value = getattr(self.context, "value", None)
        return 0

    def cuCtxSetCurrent(self, context):  # noqa: N802
        self.context.value = context
        return 0

    def cuDeviceGet(self, device, index):  # noqa: N802
        return self.failing.get("cuDeviceGet", 0)

    def cuDevicePrimaryCtxRetain(self, context, device):  # noqa: N802
        context._obj.value = 1
        return 0

    def cuLaunchKernel(self, function, *rest):  # noqa: N802
        *geometry, stream, pointers, extra = rest
        status = self._status("cuLaunchKernel")
        if not status:
            self.launches.append((function, tuple(geometry), stream))
            self.kernels[function].launch(pointers)
        return status

    def cuLaunchKernelEx(self, config, function, pointers, extra):  # noqa: N802
        config = config._obj
        assert config.count == 1 and config.attributes[0].id == 6 and config.attributes[0].value == 1
        status = self._status("cuLaunchKernelEx")
        if not status:
            geometry = tuple(getattr(config, name) for name, _ in config._fields_[:7])
            self.launches.append((function, geometry, config.stream))
            self.dependent.append(len(self.launches) - 1)
            self.kernels[function].launch(pointers)
        return status

    def cuGetErrorName(self, status, name):  # noqa: N802
        return 0

    def cuGraphCreate(self, graph, flags):  # noqa: N802
        self.graphs.append([])
        graph._obj.value = len(self.graphs)
        return self._status("cuGraphCreate")

    def cuGraphAddKernelNode_v2(self, node, graph, before, count, kernel):  # noqa: N802
        nodes = self.graphs[graph.value - 1]
        self.waits.append([before[index] - 1 for index in range(count)])
        nodes.append(None)
        node._obj.value = len(nodes)
        self._take(graph, node._obj, kernel)
        return self._status("cuGraphAddKernelNode")

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):  # noqa: N802
        executable._obj.value = graph.value
        return self._status("cuGraphInstantiate")

    def cuGraphExecKernelNodeSetParams_v2(self, executable, node, kernel):  # noqa: N802
        status = self._status("cuGraphExecKernelNodeSetParams")
        if callable(status):  # asked anew for each kernel
            status = status()
        if not status:
            self.updates += 1
            self._take(executable, node, kernel)
        return status

    def _take(self, graph, node, kernel):
        compiled = self.kernels[kernel._obj.function or 0]
        taken = compiled.values(ctypes.cast(kernel._obj.parameters, ctypes.POINTER(ctypes.c_void_p)))
        self.graphs[graph.value - 1][node.value - 1] = (compiled, taken, kernel._obj)

    def cuGraphLaunch(self, executable, stream):  # noqa: N802
        status = self._status("cuGraphLaunch")
        for compiled, values, kernel in self.graphs[executable.value - 1] if not status else ():
            geometry = tuple(getattr(kernel, name) for name, _ in kernel._fields_[1:8])
            self.launches.append((compiled.function, geometry, stream))
            add_scaled(*values)
        return status

    def cuGraphDestroy(self, graph):  # noqa: N802
        self.destroyed += 1
        return 0

    def cuGraphExecDestroy(self, executable):  # noqa: N802
        self.graphs[executable.value - 1] = None
        return 0


def chain(kernel):
    """z = 6·a + b through scratch, and w = 2·a: two results, one scratch tensor."""
    from bora_kernels.replay.recording import empty, launch
    from bora_kernels.replay.stage import stage

    calls = []

    @stage
    def run(a, b, *, scale):
        calls.append(scale)
        (n,) = a.shape
        scratch, w, z = (empty((n,), torch.float32, a.device) for _ in range(3))
        launch(kernel, (1,), (a, None, w), n=n, scale=scale, ONE=1)
        launch(kernel, (1,), (w, None, scratch), n=n, scale=3.0, ONE=1)
        launch(kernel, (2, 3), (scratch, b, z), n=n, scale=1.0, ONE=1)
        return z, None, w

    return run, calls


def vectors(n=10, count=2):
    return [torch.randn(n) for _ in range(count)]


def assert_chain(results, a, b, scale=2.0):
    z, absent, w = results
    torch.testing.assert_close(w, scale * a, rtol=1e-6, atol=0)
    torch.testing.assert_close(z, 3 * scale * a + b, rtol=1e-6, atol=1e-6)
    assert absent is None


def check(run, times=1, **options):
    """That a chain has the right results, so often; returns the texts of warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            a, b = vectors()
            assert_chain(run(a, b, scale=2.0, **options), a, b)
    return [str(warning.message) for warning in caught]
