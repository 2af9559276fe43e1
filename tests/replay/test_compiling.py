"""Kernels of a stage are compiled side by side before the first is launched, each variant once."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
from helpers.fake_driver import Driver

pytest.importorskip("triton", reason="needs triton")

import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bora_kernels.replay import compiled, compiling
from bora_kernels.replay.recording import PlannedLaunch, empty, launch, planning
from bora_kernels.replay.stage import compiled_with, stage


class Kernel:
    """Stands in for a kernel; says what is compiled and launched, and in which thread."""

    def __init__(self, log, barrier=None, error=None, compiling=contextlib.nullcontext, compiled=None):
        self.log, self.barrier, self.error = log, barrier, error
        self.compiling, self.compiled = compiling, compiled  # a context that it is compiled in, and what comes out

        def fn(t_ptr, other_ptr, M, scale, R: tl.constexpr):
            pass

        self.fn = fn

    def warmup(self, *tensors, grid, **arguments):
        if self.barrier is not None:
            self.barrier.wait(timeout=20)  # all of them are compiled at the same time, or this breaks
        with self.compiling():
            self.log.append(("compiled", self, arguments["R"], threading.current_thread() is threading.main_thread()))
        if self.error is not None:
            raise self.error
        return self.compiled

    def __getitem__(self, grid):
        def run(*tensors, **arguments):
            if self.error is not None:
                raise self.error
            self.log.append(("launched", self, arguments["R"], threading.current_thread() is threading.main_thread()))

        return run


@pytest.fixture
def log(monkeypatch):
    """What kernels do, on CPU tensors that are taken for such on a device; no kernel was met before."""
    monkeypatch.setattr(compiling, "_known", set())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    compile_stage = compiling.compile_stage
    playing = Driver().play(monkeypatch)
    next(playing)
    monkeypatch.setattr("bora_kernels.replay.stage.compile_stage", compile_stage)
    monkeypatch.setattr(compiling, "_usable_cores", lambda: 8)
    yield []
    next(playing, None)


def stage_of(*kernels):
    @stage
    def run(t, *, rank):
        scratch, y = empty((8,), torch.float32, t.device), empty(t.shape, t.dtype, t.device)
        for kernel in kernels:
            launch(kernel, (1,), (t, scratch), M=len(t), scale=0.5, R=rank)
        return (y,)

    return run


def missing_of(*kernels):
    missing = compiling.Missing()
    for kernel in kernels:
        missing.append(PlannedLaunch(kernel, (1,), (torch.zeros(4), None), {"M": 32, "scale": 0.5, "R": 4}))
    return missing


@pytest.mark.filterwarnings("ignore:bora_kernels runs kernels as usual")
def test_all_are_compiled_at_once_before_any_is_launched(log):
    barrier = threading.Barrier(3)
    kernels = [Kernel(log, barrier) for _ in range(3)]
    stage_of(*kernels, kernels[0])(torch.zeros(32), rank=4)
    assert [entry[0] for entry in log] == ["compiled"] * 3 + ["launched"] * 4
    assert {entry[1] for entry in log[:3]} == set(kernels)
    assert not any(entry[3] for entry in log[:3]) and all(entry[3] for entry in log[3:])


@pytest.mark.filterwarnings("ignore:bora_kernels runs kernels as usual")
@pytest.mark.parametrize("error", [None, ValueError("of the plan")], ids=["", "an error"])
def test_what_follows_a_stage_is_compiled_with_it(log, error):
    first, second = Kernel(log), Kernel(log)
    forward, backward = stage_of(first), stage_of(second)

    @compiled_with(forward)
    def plan(results, t, *, rank):
        assert results[0].shape == t.shape
        backward(*results, rank=rank)
        if error is not None:
            raise error

    forward(torch.zeros(32), rank=4)
    assert [(what, kernel) for what, kernel, *_ in log if what == "launched"] == [("launched", first)]
    assert {kernel for what, kernel, *_ in log if what == "compiled"} == {first, second}
    backward(torch.zeros(32), rank=4)
    assert [entry[0] for entry in log] == ["compiled", "compiled", "launched", "launched"]


def test_kernels_are_loaded_where_no_thread_compiles_or_loads(log):
    """Otherwise Triton 3.6 may give a kernel another one's launcher; that of two stages in two threads, too."""
    busy, loaded, barrier = set(), [], threading.Barrier(2)

    @contextlib.contextmanager
    def noted(what):
        busy.add((what, threading.get_ident()))
        time.sleep(0.01)
        yield set(busy)
        busy.remove((what, threading.get_ident()))

    class Compiled:
        @property
        def run(self):
            with noted("loads") as others:
                loaded.append(len(others) == 1)

    def run_stage():
        missing = missing_of(*[Kernel(log, None, None, lambda: noted("compiles"), Compiled()) for _ in range(3)])
        barrier.wait(timeout=20)
        missing.compile()

    threads = [threading.Thread(target=run_stage) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [True] * 6


def test_one_that_cannot_be_loaded_keeps_no_other_from_it(log):
    loaded = []

    class Compiled:
        @property
        def run(self):
            loaded.append(self)
            if len(loaded) == 1:
                raise RuntimeError("out of resources: shared memory")

    missing = missing_of(*[Kernel(log, compiled=Compiled()) for _ in range(3)])
    assert missing.compile() == len(loaded) == 3


@pytest.mark.filterwarnings("ignore:bora_kernels runs kernels as usual")
def test_what_was_met_before_is_not_compiled_again(log):
    """Another number of tokens of the same kind, in another stage; another rank is another kernel."""
    kernels = [Kernel(log), Kernel(log)]
    run = stage_of(*kernels)
    for tokens, rank, compiled_now in ((32, 4, 2), (4800, 4, 0), (33, 4, 2), (7001, 4, 0), (32, 8, 2), (1, 8, 2)):
        log.clear()
        run(torch.zeros(tokens), rank=rank)
        assert [entry[0] for entry in log] == ["compiled"] * compiled_now + ["launched"] * 2, (tokens, rank)
    log.clear()
    stage_of(*reversed(kernels))(torch.zeros(64), rank=4)
    assert [entry[0] for entry in log] == ["launched"] * 2


@pytest.mark.parametrize(
    "other",
    [
        {"tensors": (torch.zeros(4, dtype=torch.bfloat16), None)},
        {"tensors": (torch.zeros(8)[1:], None)},
        {"tensors": (None, None)},
        {"tensors": (TensorDescriptor(torch.zeros(16, 16), [16, 16], [16, 1], [8, 16]), None)},
        {"arguments": {"M": 1, "scale": 0.5, "R": 4}},
        {"arguments": {"M": 2**31, "scale": 0.5, "R": 4}},
        {"arguments": {"M": 32, "scale": 0.5, "R": 8}},
        {"arguments": {"M": 32, "scale": 0.5, "R": 4, "num_warps": 8}},
    ],
    ids=["dtype", "alignment", "None", "descriptor", "one", "int64", "constexpr", "option"],
)
def test_what_makes_a_kernel_another(log, other):
    one = PlannedLaunch(Kernel(log), (1,), (torch.zeros(4), None), {"M": 32, "scale": 0.5, "R": 4})
    missing = compiling.Missing()
    for each in (one, one._replace(arguments={"M": 64, "scale": 3.5, "R": 4}), one._replace(**other)):
        missing.append(each)
    assert len(missing.launches) == 2 and missing.compile() == 2 and len(log) == 2
    again = compiling.Missing()
    again.append(one._replace(**other))
    assert again.compile() == 0


@pytest.mark.parametrize("compiled_by", ["do_not_specialize", "kwargs"], ids=["Triton", "the interpreter"])
def test_sizes_that_are_not_specialized_make_no_kernel_another(log, compiled_by):
    kernel = Kernel(log)
    names = ["M"]
    setattr(kernel, compiled_by, names if compiled_by == "do_not_specialize" else {"do_not_specialize": names})
    missing = compiling.Missing()
    for M in (1, 7, 32, 2**31 - 1):
        missing.append(PlannedLaunch(kernel, (1,), (None, None), {"M": M, "scale": 0.5, "R": 4}))
    assert len(missing.launches) == 1
    missing.append(PlannedLaunch(kernel, (1,), (None, None), {"M": 2**31, "scale": 0.5, "R": 4}))
    assert len(missing.launches) == 2, "int64"


def test_tensors_of_a_plan_may_go(log):
    """A whole model is planned before anything is compiled: what stands in for its tensors is of a few elements."""
    big = torch.zeros(1000, 1000, dtype=torch.float16)
    descriptor = TensorDescriptor(big, [1000, 1000], [1000, 1], [64, 64])
    missing = compiling.Missing()
    missing.append(PlannedLaunch(Kernel(log), (1,), (big[1:, 1:], None, descriptor), {"M": 1, "R": 4}))
    (kept,) = missing.launches.values()
    tensor, absent, described = kept.tensors
    assert absent is None and tensor.dtype == described.base.dtype == torch.float16
    assert tensor.untyped_storage().nbytes() < 100 and described.base.untyped_storage().nbytes() < 100
    assert tensor.data_ptr() % 16 != 0 and described.base.data_ptr() % 16 == 0
    assert (described.shape, described.strides, described.block_shape) == ([1000, 1000], [1000, 1], [64, 64])


@pytest.mark.filterwarnings("ignore:bora_kernels runs kernels as usual")
def test_an_error_is_the_launchs(log):
    """What does not compile raises where it is launched; the others are compiled."""
    fine, broken = Kernel(log), Kernel(log, error=ValueError("does not compile"))
    with pytest.raises(ValueError, match="does not compile"):
        stage_of(fine, broken)(torch.zeros(32), rank=4)
    assert [entry[:2] for entry in log if entry[1] is fine] == [("compiled", fine), ("launched", fine)]


@pytest.mark.filterwarnings("ignore:bora_kernels runs kernels as usual")
def test_a_capture_compiles_as_it_launches(log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stage_of(Kernel(log), Kernel(log))(torch.zeros(32), rank=4)
    assert [entry[0] for entry in log] == ["launched"] * 2


def test_planning_is_of_one_thread(log):
    """What other threads launch meanwhile happens."""
    kernel, missing = Kernel(log), compiling.Missing()
    with planning(missing):
        launch(kernel, (1,), (torch.zeros(4), None), M=32, scale=0.5, R=4)
        other = threading.Thread(
            target=launch, args=(kernel, (1,), (torch.zeros(4), None)), kwargs={"M": 32, "scale": 0.5, "R": 8}
        )
        other.start()
        other.join()
    assert [entry[:3] for entry in log] == [("launched", kernel, 8)] and len(missing.launches) == 1
    launch(kernel, (1,), (torch.zeros(4), None), M=32, scale=0.5, R=4)
    assert len(log) == 2


def test_the_table_of_variants_is_made_once(log):
    """Triton makes it when it is first looked at; threads that look at once would lose what one of them compiled."""
    looked = []

    class Caches(dict):
        def __missing__(self, device):
            looked.append((device, threading.current_thread() is threading.main_thread()))

    kernel = Kernel(log)
    kernel.device_caches = Caches()
    compiled.share_cache(kernel, 3)
    assert looked == [(3, True)]
    compiled.share_cache(Kernel(log), 3)  # a Triton that keeps it elsewhere
