"""Replays through the real driver: that they happen, contexts of threads, what is missing or full, memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers.accuracy import assert_equal
from helpers.interpreter import interpreter_problem
from helpers.on_gpu import assert_runs, data, in_a_thread, layer, step

from bora_kernels import replay_disabled
from bora_kernels.replay import plan_cache

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_replays")]


def graphs() -> int:
    return sum(entry.graph is not None for entry in plan_cache._entries)


# ---- replays happen, and can be turned off ----


def test_replays_and_their_absence_give_the_same_bits():
    module, (x, dy) = layer(), data()
    with replay_disabled():
        expected = step(module, x, dy)
        assert plan_cache.size == 0
    for _ in range(6):
        assert_equal(step(module, x, dy), expected)
    assert plan_cache.size == graphs() == 2
    with replay_disabled():
        assert_equal(step(module, x, dy), expected)


def test_launch_hooks_see_replayed_layers():
    from triton import knobs

    seen, (module, (x, dy)) = [], (layer(), data())
    for _ in range(5):
        expected = step(module, x, dy)

    def hook(metadata):
        seen.append(metadata.get()["name"] if hasattr(metadata, "get") else metadata)

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert_equal(step(module, x, dy), expected)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    count = len(seen)
    assert count >= 10
    assert_equal(step(module, x, dy), expected)
    assert len(seen) == count


# ---- threads ----


@pytest.mark.parametrize("calls", [1, 2, 5], ids=["second call", "third", "graph"])
def test_a_thread_whose_first_call_is_a_replay(calls):
    module, (x, _) = layer(), data()
    with torch.no_grad():
        expected = [module(x) for _ in range(calls)][-1]
        torch.cuda.synchronize()

    def work():
        with torch.no_grad():
            y = module(x)
        torch.cuda.synchronize()
        return y

    assert torch.equal(in_a_thread(work), expected)


def test_backward_in_a_thread_whose_first_call_is_a_replay():
    """Autograd's own thread, which only a fresh process does not have yet."""
    script = """
        import torch
        from bora_kernels import FusedBoraLinear
        module = FusedBoraLinear(192, 256, r=16, dtype=torch.bfloat16, device="cuda")
        torch.nn.init.normal_(module.lora_B)
        trained = [p for p in module.parameters() if p.requires_grad]
        x = torch.randn(64, 192, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
        def step():
            return torch.autograd.grad(module(x), trained, dy)
        with torch.autograd.set_multithreading_enabled(False):
            expected = [step() for _ in range(2)][-1]
        torch.cuda.synchronize()
        assert all(map(torch.equal, step(), expected))
    """
    assert_runs(script)


# ---- what is missing ----


def test_an_old_driver():
    assert_runs("""
        import ctypes, warnings
        import torch
        real = ctypes.CDLL
        class Old:
            def __init__(self, library): self.library = library
            def __getattr__(self, name):
                if name == "cuFuncGetParamInfo": raise AttributeError(name)
                return getattr(self.library, name)
        ctypes.CDLL = lambda name, *a, **k: (Old if "libcuda.so" in str(name) else lambda x: x)(real(name, *a, **k))
        from bora_kernels import FusedBoraLinear
        module = FusedBoraLinear(192, 256, r=16, dtype=torch.bfloat16, device="cuda")
        x = torch.randn(64, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                module(x).float().square().sum().backward()
        assert x.grad.isfinite().all()
        texts = [str(w.message) for w in caught if "cannot replay" in str(w.message)]
        assert len(texts) == 1 and "cuFuncGetParamInfo" in texts[0], texts
    """)


@pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))
def test_the_interpreter_on_tensors_of_a_device():
    assert_runs("""
        import os, warnings
        os.environ["TRITON_INTERPRET"] = "1"
        import torch
        from bora_kernels import FusedBoraLinear
        module = FusedBoraLinear(32, 16, r=4, device="cuda")
        torch.nn.init.normal_(module.lora_B)
        x = torch.randn(4, 32, device="cuda", requires_grad=True)
        results = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for module.backend in ("triton", "triton", "reference"):
                y = module(x)
                results[module.backend] = [y, *torch.autograd.grad(y.square().sum(), [x, module.lora_A])]
        for a, b in zip(results["triton"], results["reference"]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        texts = [str(w.message) for w in caught if "cannot replay" in str(w.message)]
        assert texts and all("interpreter" in text for text in texts), texts
    """)


def test_no_memory_for_graphs(monkeypatch):
    """As `cuGraphInstantiate` answers on a full device."""
    from bora_kernels.replay import driver

    class Full(driver.Graph):
        def __init__(self, launches):
            raise driver.DriverError("cuGraphInstantiate failed: CUDA_ERROR_OUT_OF_MEMORY (2)")

    module, (x, dy) = layer(), data()
    expected = step(module, x, dy)
    monkeypatch.setattr(driver, "Graph", Full)
    with pytest.warns(UserWarning, match="OUT_OF_MEMORY"):
        for _ in range(6):
            assert_equal(step(module, x, dy), expected)
    monkeypatch.undo()
    assert_equal(step(module, x, dy), expected)
    assert plan_cache.size == 2 and graphs() == 0


# ---- memory ----


def test_the_first_step_takes_no_more_memory_than_one_without_recording():
    module, (x, dy) = layer(1024, 4096), data(512, 1024, 4096)
    step(module, x, dy)  # compiles
    peaks = []
    for context in (replay_disabled(), nullcontext()):
        plan_cache.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with context:
            step(module, x, dy)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0] + (1 << 20)


def test_the_cache_counts_what_graphs_take():
    """Within a factor of two, on average over many: the driver takes memory in pieces that several graphs share."""
    module = layer()
    for M in range(16, 16 + 8 * 40, 8):
        for _ in range(5):
            step(module, *data(M))
    torch.cuda.synchronize()
    made = graphs()
    assert made == 80
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    counted = plan_cache.bytes
    plan_cache.clear()
    torch.cuda.synchronize()
    freed = torch.cuda.mem_get_info()[0] - before
    print(
        f"\n{made} graphs: {counted / made / 1024:.0f} KiB each as counted, {freed / made / 1024:.0f} KiB each as freed"
    )
    assert freed < 2 * counted


def test_a_small_cache_gives_the_same_bits():
    module, lengths = layer(), (16, 40, 64, 104, 200)
    batches = {M: data(M) for M in lengths}
    with replay_disabled():
        expected = {M: step(module, *batches[M]) for M in lengths}
    before = plan_cache.max_bytes
    try:
        plan_cache.max_bytes = 3 << 20
        for turn in range(60):
            M = lengths[turn * 7 % 5 if turn % 2 else turn // 8 % 5]
            assert_equal(step(module, *batches[M]), expected[M])
            assert plan_cache.bytes <= plan_cache.max_bytes
        plan_cache.max_bytes = 100_000
        for M in lengths * 6:
            assert_equal(step(module, *batches[M]), expected[M])
    finally:
        plan_cache.max_bytes = before
