"""Replays through the real driver: contexts of threads, what is missing or full, captures, memory, moved tensors."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers.cases import HALVES, SCALING, Case, run
from torch import nn

from bora_kernels import FusedBoraLinear, bora_linear, replay_disabled
from bora_kernels.replay import plan_cache, switch

pytestmark = pytest.mark.gpu

DEVICE, BF16 = "cuda", HALVES[0]
NAMES = ("lora_A", "lora_B", "magnitude_row", "magnitude_col")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No recordings, no warnings said; a warning fails the test that does not expect it."""
    plan_cache.clear()
    monkeypatch.setattr(switch, "_warned", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot replay.*")
        yield
    plan_cache.clear()


def graphs() -> int:
    return sum(entry.graph is not None for entry in plan_cache._entries)


def layer(K=192, N=256, r=16, dtype=BF16, **options):
    module = FusedBoraLinear(K, N, r=r, dtype=dtype, device=DEVICE, **options)
    nn.init.normal_(module.lora_B, std=0.05)
    module.backend = "triton"
    return module


def data(M=64, K=192, N=256, dtype=BF16):
    x = torch.randn(M, K, device=DEVICE).to(dtype).requires_grad_()
    return x, torch.randn(M, N, device=DEVICE).to(dtype)


def step(module, x, dy, between=lambda y: None):
    y = module(x)
    between(y)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def in_a_thread(function):
    results = []

    def work():
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


# ---- replays happen, and can be turned off ----


def test_replays_and_their_absence_give_the_same_bits():
    module, (x, dy) = layer(), data()
    with replay_disabled():
        expected = step(module, x, dy)
        assert plan_cache.size == 0
    for _ in range(6):
        assert_same(step(module, x, dy), expected)
    assert plan_cache.size == graphs() == 2
    with replay_disabled():
        assert_same(step(module, x, dy), expected)


def test_launch_hooks_see_replayed_layers():
    from triton import knobs

    seen, (module, (x, dy)) = [], (layer(), data())
    for _ in range(5):
        expected = step(module, x, dy)

    def hook(metadata):
        seen.append(metadata.get()["name"] if hasattr(metadata, "get") else metadata)

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert_same(step(module, x, dy), expected)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    count = len(seen)
    assert count >= 10
    assert_same(step(module, x, dy), expected)
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


def assert_runs(script):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


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
            assert_same(step(module, x, dy), expected)
    monkeypatch.undo()
    assert_same(step(module, x, dy), expected)
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
            assert_same(step(module, *batches[M]), expected[M])
            assert plan_cache.bytes <= plan_cache.max_bytes
        plan_cache.max_bytes = 100_000
        for M in lengths * 6:
            assert_same(step(module, *batches[M]), expected[M])
    finally:
        plan_cache.max_bytes = before


# ---- what a backward finds ----


MOVES = {
    "contiguous": lambda t: t.data.clone(memory_format=torch.contiguous_format),
    "transposed": lambda t: t.data.T.contiguous().T,
    "shifted": lambda t: torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)[1:].view_as(t).copy_(t.data),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_other_data_between_forward_and_backward(name, move):
    case = Case(64, 256, 192, 16, dtype=BF16)
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    wide = torch.randn(64, 3 * 192, device=DEVICE).to(BF16)
    wide[:, 192:384] = inputs["x"]
    inputs["x"] = wide[:, 192:384]  # as a slice of a fused projection

    def moving(**tensors):
        tensors["x"] = tensors["x"]
        backend = tensors.pop("backend")
        y = bora_linear(**tensors, backend=backend)
        if backend == "triton" and moves[0]:
            tensors[name].data = MOVES[move](tensors[name])
        return y

    moves = [False]
    for _ in range(5):
        expected = run(moving, inputs, dy, scaling=SCALING, backend="triton")
    moves[0] = True
    for _ in range(5):
        actual = run(moving, inputs, dy, scaling=SCALING, backend="triton")
        for key, value in actual.items():
            torch.testing.assert_close(value, expected[key], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "magnitude_row"])
@pytest.mark.parametrize("what", ["cpu", "pinned", "freed"])
def test_a_tensor_that_is_gone(what, name):
    """An error that names it, and a device that still works."""
    module, (x, dy) = layer(), data()
    for _ in range(5):
        expected = step(module, x, dy)
    tensor = x if name == "x" else getattr(module, name)
    kept = tensor.detach().clone()

    def take(y=None):
        if what == "freed":
            tensor.data.untyped_storage().resize_(0)
        else:
            tensor.data = tensor.data.cpu().pin_memory() if what == "pinned" else tensor.data.cpu()

    message = "whose memory was freed" if what == "freed" else rf"{name} must be on dy's device cuda:0 .* got cpu"
    with pytest.raises(ValueError, match=message):
        step(module, x, dy, take)
    if what == "freed":
        with pytest.raises(ValueError, match=f"{name} must hold .* whose memory was freed"):
            module(x)
    tensor.data = kept
    assert_same(step(module, x, dy), expected)


SETTINGS = {
    "legacy": ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32x3"),
    "high": ("torch.set_float32_matmul_precision('high')", "tf32x3"),
    "matmul-tf32": ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32x3"),
    "matmul-ieee": ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
    "global-tf32": ("torch.backends.fp32_precision = 'tf32'", "tf32x3"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_either_setting_of_tf32(name):
    """In a process of its own: PyTorch does not forget which of its two interfaces was used."""
    setting, expected = SETTINGS[name]
    assert_runs(f"""
        import torch
        {setting}
        from bora_kernels import FusedBoraLinear
        from bora_kernels.ops import triton_backend
        assert triton_backend._precision(torch.float32) == "{expected}"
        module = FusedBoraLinear(192, 256, r=16, device="cuda")
        x = torch.randn(64, 192, device="cuda", requires_grad=True)
        for autocast in (False, True):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                for _ in range(5):
                    torch.autograd.grad(module(x).float().square().sum(), [x, module.lora_A])
    """)


def test_a_gradient_that_is_the_saved_output():
    """Inputs of one stage that share memory."""
    module, (x, _) = layer(bias=False), data()
    with replay_disabled():
        y = module(x)
        expected = torch.autograd.grad(y, [x, module.lora_A], y.detach())
    for _ in range(4):
        y = module(x)
        assert_same(torch.autograd.grad(y, [x, module.lora_A], y.detach()), expected)


# ---- captures by the user ----


def captured(module, x, dy, **options):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        results = step(module, x, dy)
    return graph, results


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own streams"])
@pytest.mark.parametrize("replays", [True, False], ids=["replays", "plain"])
@pytest.mark.parametrize("before", [1, 2, 5])
def test_several_captures_in_one_process(before, replays, own_stream):
    """On the stream that PyTorch captures on by default, and each on one of its own, with eager steps between."""
    with nullcontext() if replays else replay_disabled():
        module, captures = layer(), []
        for M in (64, 96, 64, 128):
            x, dy = data(M)
            for _ in range(before):
                expected = step(module, x, dy)
            options = {"stream": torch.cuda.Stream()} if own_stream else {}
            captures.append((*captured(module, x, dy, **options), expected))
        for _ in range(2):
            for graph, results, expected in captures:
                for result in results:
                    result.zero_()
                graph.replay()
                assert_same(results, expected)
                step(module, *data(80))


def test_an_autograd_graph_that_is_kept_beside_a_capture_is_pytorchs_matter():
    """Gradient accumulators remember the stream of the forward that made them, as long as its graph is kept: a capture
    on another stream then waits for that one, or cannot. The layer does as `nn.Linear` does."""
    script = """
        import sys, torch
        from torch import nn
        from bora_kernels import FusedBoraLinear
        kinds = {{"linear": nn.Linear, "bora": FusedBoraLinear}}
        module = kinds["{kind}"](192, 256, device="cuda", dtype=torch.bfloat16)
        trained = [p for p in module.parameters() if p.requires_grad]
        x = torch.randn(64, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
        def step():
            y = module(x)
            return y, torch.autograd.grad(y, [x, *trained], dy)
        for _ in range(3): step()
        kept = step() if {kept} else None
        outcomes = []
        for _ in range(2):
            try:
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()):
                    kept_too = step()
                outcomes.append("captured")
            except Exception as error:
                outcomes.append("refused")
                break
        print(outcomes)
    """
    for kept in (False, True):
        outcomes = {}
        for kind in ("linear", "bora"):
            text = textwrap.dedent(script).format(kind=kind, kept=kept)
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
            outcomes[kind] = done.stdout.strip().splitlines()[-1:] or done.stderr[-500:]
        assert outcomes["bora"] == outcomes["linear"], (kept, outcomes)
        assert kept or outcomes["bora"] == ["['captured', 'captured']"], outcomes


# ---- two devices ----


@pytest.mark.gpu(2)
def test_data_parallel():
    """Replicas run in threads that are new in every step."""
    module = layer()
    replicated = nn.DataParallel(module, [0, 1])
    x, dy = data(128)
    trained = [getattr(module, name) for name in NAMES]
    for _ in range(5):
        y = replicated(x)
        actual = [y, *torch.autograd.grad(y, [x, *trained], dy)]
        y = module(x)
        expected = [y, *torch.autograd.grad(y, [x, *trained], dy)]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu(2)
def test_a_layer_on_the_second_device():
    module = layer().to("cuda:1")
    x, dy = (t.detach().to("cuda:1") for t in data())
    x.requires_grad_()
    expected = step(module, x, dy)
    for _ in range(4):
        assert_same(step(module, x, dy), expected)
    assert_same(in_a_thread(lambda: step(module, x, dy)), expected)
    assert torch.cuda.current_device() == 0
