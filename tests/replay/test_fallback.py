"""Where a replay cannot do what it relies on, stages run as Python, with one warning that says why."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers.fake_driver import Kernel, chain, check, vectors

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.replay import driver as cuda_driver
from bora_kernels.replay import switch
from bora_kernels.replay.recording import empty, launch
from bora_kernels.replay.stage import stage

REAL_CUDA, REAL_PARAMETER_SIZES = cuda_driver.cuda, cuda_driver.parameter_sizes


# ---- what is missing or other than expected ----


SURPRISES = [
    {"sizes": [8, 8, 4, 4, 8]},
    {"num_ctas": 2},
    {"launch_cooperative_grid": True},
    {"global_scratch_size": 16},
    {"profile_scratch_size": 8},
]


@pytest.mark.parametrize("surprise", SURPRISES, ids=lambda surprise: next(iter(surprise)))
def test_unknown_conventions_run_as_python(driver, surprise):
    run, calls = chain(Kernel(driver, **surprise))
    texts = check(run, times=4)
    assert len(calls) == 4 and not driver.launches
    assert len(texts) == 1 and "cannot replay" in texts[0]


def without(what):
    """Change what launches return, as another version of Triton could."""

    def change(kernel):
        inner = type(kernel).__getitem__

        class Moved(type(kernel)):
            def __getitem__(self, grid):
                def call(*tensors, **arguments):
                    result = inner(self, grid)(*tensors, **arguments)
                    if what == "result":
                        return None
                    where, name = what.split(".") if "." in what else (None, what)
                    part = getattr(result, where) if where else result
                    changed = SimpleNamespace(**{k: v for k, v in vars(part).items() if k != name})
                    if where is None:
                        return changed
                    return SimpleNamespace(**{**vars(result), where: changed})

                return call

        kernel.__class__ = Moved
        return kernel

    return change


PARTS = ["result", "src", "metadata", "function", "src.signature", "src.fn", "metadata.num_warps", "metadata.num_ctas"]


@pytest.mark.parametrize("part", PARTS)
def test_other_versions_of_triton(driver, part):
    """A kernel's parts that are not where they were, and the interpreter, whose launches return nothing."""
    run, calls = chain(without(part)(Kernel(driver)))
    texts = check(run, times=3)
    assert len(calls) == 3 and not driver.launches
    assert len(texts) == 1 and ("interpreter" if part == "result" else "Triton") in texts[0]


class Library:
    """A driver's library without some of its calls."""

    def __init__(self, *missing):
        self.missing = missing

    def __getattr__(self, name):
        if name in self.missing:
            raise AttributeError(f"libcuda.so.1: undefined symbol: {name}")
        return SimpleNamespace()


def no_library(name):
    raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")


LIBRARIES = {
    "old": (lambda name: Library("cuFuncGetParamInfo"), "has no cuFuncGetParamInfo, it is older than CUDA 12.4"),
    "older": (lambda name: Library("cuGraphAddKernelNode_v2", "cuFuncGetParamInfo"), "older than CUDA 12.4"),
    "none": (no_library, "library cannot be loaded .libcuda.so.1: cannot open"),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_old_drivers(driver, monkeypatch, library):
    """Nothing is replayed, other stages do not even try, and only the first says so."""
    load, message = LIBRARIES[library]
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(cuda_driver, "cuda", REAL_CUDA.__wrapped__)
    monkeypatch.setattr(cuda_driver, "parameter_sizes", REAL_PARAMETER_SIZES)
    monkeypatch.setattr(switch, "off", False)
    monkeypatch.setattr(switch, "_for_good", False)
    kernel = Kernel(driver)
    (first, calls), (second, _) = chain(kernel), chain(kernel)
    with pytest.warns(UserWarning, match=message):
        first(*vectors(), scale=2.0)
    assert switch.off
    assert check(first, times=3) == check(second, times=3) == []
    assert len(calls) == 4 and not driver.launches


def test_each_problem_is_said_once(driver):
    stages = [chain(Kernel(driver, num_ctas=2))[0] for _ in range(3)]
    stages += [chain(Kernel(driver, sizes=[8]))[0] for _ in range(3)]
    assert len([text for run in stages for text in check(run, times=2)]) == 2


def test_memory_from_elsewhere(driver):
    """A stage's mistake costs it its replays: plain launches do not mind."""
    kernel = Kernel(driver)

    @stage
    def run(a, *, returned):
        other, y = torch.zeros(10), empty((10,), torch.float32, a.device)
        launch(kernel, (1,), (a, None, other), n=10, scale=2.0, ONE=1)
        return (other if returned else y,)

    (a,) = vectors(count=1)
    with pytest.warns(UserWarning, match="launched a kernel on memory that is neither its input nor from `empty`"):
        run(a, returned=False)
    with pytest.warns(UserWarning, match="returned a tensor that is not from `empty`"):
        run(a, returned=True)
    for _ in range(3):
        assert torch.equal(run(a, returned=True)[0], 2 * a)


# ---- calls of the driver that fail ----


GRAPH_CALLS = ["cuGraphCreate", "cuGraphAddKernelNode", "cuGraphInstantiate", "cuGraphLaunch"]


@pytest.mark.parametrize("call", GRAPH_CALLS)
def test_without_memory_for_a_graph(driver, call):
    """Single launches go on; that plan asks for no graph again, another one does."""
    run, calls = chain(Kernel(driver))
    driver.failing[call] = 2
    texts = check(run, times=10)
    assert len(texts) == 1 and f"{call} failed: error (2)" in texts[0] and "one by one" in texts[0]
    assert len(calls) == 1 and len(driver.launches) == 3 * 9
    assert driver.destroyed == (call != "cuGraphCreate") and len(driver.graphs) == 1
    driver.failing.clear()
    assert check(run, times=5) == []
    assert len(driver.graphs) == 1
    other, _ = chain(Kernel(driver))
    assert check(other, times=5) == []
    assert len(driver.graphs) == 2


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_an_update_that_fails_halfway(driver, taken):
    """What the graph holds of two calls is never launched."""
    run, calls = chain(Kernel(driver))
    check(run, times=5)
    before, statuses = len(driver.launches), iter([0] * taken + [2])
    driver.failing["cuGraphExecKernelNodeSetParams"] = lambda: next(statuses, 0)
    texts = check(run, times=6)
    assert len(texts) == 1 and "cuGraphExecKernelNodeSetParams failed" in texts[0]
    assert len(calls) == 1 and len(driver.launches) == before + 3 * 6


@pytest.mark.parametrize("replays", [0, 1, 2, 4])
def test_a_launch_that_fails(driver, replays):
    """The stage runs through Triton: where the device is lost it raises, and where not, it goes on so."""
    kernel = Kernel(driver)
    run, calls = chain(kernel)
    check(run, times=1 + replays)
    driver.failing |= {"cuLaunchKernel": 700, "cuGraphLaunch": 700}
    kernel.lost = True
    with pytest.raises(RuntimeError, match="Triton Error"):
        run(*vectors(), scale=2.0)
    kernel.lost = False
    texts = check(run, times=3)
    assert len(texts) == 1 and "cuLaunchKernel failed: error (700)" in texts[0]
    assert len(calls) == 1 + 1 + 3


def test_memory_for_results_that_runs_out(driver, monkeypatch):
    """One workspace may not fit where its parts do; no reason to give replays up."""
    from bora_kernels.replay import plan

    run, calls = chain(Kernel(driver))
    check(run, times=2)
    with monkeypatch.context() as context:

        def allocate(*args):
            raise torch.OutOfMemoryError("out of memory")

        context.setattr(plan, "allocate", allocate)
        assert check(run, times=2) == []
    assert len(calls) == 3
    check(run, times=2)
    assert len(calls) == 3


# ---- threads ----


@pytest.mark.parametrize("replays", [0, 1, 4])
def test_a_thread_without_a_context(driver, replays):
    """A thread's first call of CUDA may be a replay: autograd's own thread in the first backward, say."""
    run, calls = chain(Kernel(driver))
    check(run, times=1 + replays)
    texts = []
    thread = threading.Thread(target=lambda: texts.append(check(run, times=3)))
    thread.start()
    thread.join()
    assert texts == [[]] and len(calls) == 1


def test_a_context_that_cannot_be_had(driver):
    run, calls = chain(Kernel(driver))
    check(run)
    driver.failing["cuDeviceGet"] = 3
    texts = []
    thread = threading.Thread(target=lambda: texts.extend(check(run, times=3)))
    thread.start()
    thread.join()
    assert len(texts) == 1 and "cuDeviceGet failed" in texts[0] and len(calls) == 4
