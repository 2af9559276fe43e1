"""Replays on a GPU: tensors that moved or are gone, settings of precision, captures by the user, two devices."""

from __future__ import annotations

import copy
import textwrap
from contextlib import nullcontext

import pytest
import torch
from helpers.accuracy import assert_accurate, assert_equal
from helpers.cases import NAMES as DTYPES
from helpers.cases import SCALING, Case, check_layer, run
from helpers.on_gpu import BF16, DEVICE, assert_runs, data, in_a_thread, layer, run_script, step
from torch import nn

from bora_kernels import FusedBoraLinear, bora_linear, replay_disabled

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_replays")]

NAMES = ("lora_A", "lora_B", "magnitude_row", "magnitude_col")


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
        run(moving, inputs, dy, scaling=SCALING, backend="triton")
    moves[0] = True
    for _ in range(5):
        check_layer("triton", inputs, dy, layer=moving)


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
    assert_equal(step(module, x, dy), expected)


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
        from bora_kernels.ops.triton_parts import product_precision
        assert product_precision(torch.float32) == "{expected}"
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
        assert_equal(torch.autograd.grad(y, [x, module.lora_A], y.detach()), expected)


# ---- captures by the user ----


def captured(module, x, dy, **options):
    """A graph of a step, and its results. It reads x and dy where they are, so they have to be kept."""
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
            captures.append((*captured(module, x, dy, **options), expected, (x, dy)))
        for _ in range(2):
            for graph, results, expected, _ in captures:
                for result in results:
                    result.zero_()
                graph.replay()
                assert_equal(results, expected)
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
            done = run_script(text)
            outcomes[kind] = done.stdout.strip().splitlines()[-1:] or done.stderr[-500:]
        assert outcomes["bora"] == outcomes["linear"], (kept, outcomes)
        assert kept or outcomes["bora"] == ["['captured', 'captured']"], outcomes


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=DTYPES.get)
def test_graphs_of_the_compiler(dtype):
    """mode="reduce-overhead": its graphs are warmed up, captured and replayed, with other values every time."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["inductor"]
    counters.clear()
    first, second = (FusedBoraLinear(K, N, r=8, device=DEVICE, dtype=dtype) for K, N in ((96, 160), (160, 64)))
    for part in (first, second):
        nn.init.normal_(part.lora_B, std=0.1)
    model = nn.Sequential(first, nn.GELU(), second)
    compiled, exact = torch.compile(model, mode="reduce-overhead", fullgraph=True), copy.deepcopy(model).double()

    def results(call, module, x, dy):
        torch.compiler.cudagraph_mark_step_begin()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        y = call(x)
        gradients = torch.autograd.grad(y, list(trained.values()), dy)
        # The next step writes over them.
        return {"y": y.detach().clone(), **{name: d.clone() for name, d in zip(trained, gradients, strict=True)}}

    for _ in range(6):
        x, dy = (torch.randn(64, features, device=DEVICE).to(dtype) for features in (96, 64))
        found, plain = results(compiled, model, x, dy), results(model, model, x, dy)
        assert_accurate(found, plain, results(exact, exact, x.double(), dy.double()), samples=64)
    assert not counters["cudagraph_skips"]


# ---- two devices ----


@pytest.mark.gpu(2)
def test_data_parallel():
    """Replicas run in threads that are new in every step; each does what the layer does with half of the tokens."""
    module = layer()
    replicated = nn.DataParallel(module, [0, 1])
    x, dy = data(128)
    trained = [getattr(module, name) for name in NAMES]
    halves = []
    for part, d_part in zip(x.detach().chunk(2), dy.chunk(2), strict=True):
        y = module(part.requires_grad_())
        halves.append([y, *torch.autograd.grad(y, [part, *trained], d_part)])
    first, second = halves
    expected = [torch.cat((a, b)) for a, b in zip(first[:2], second[:2], strict=True)]
    expected += [a + b for a, b in zip(first[2:], second[2:], strict=True)]
    for _ in range(5):
        y = replicated(x)
        assert_equal([y, *torch.autograd.grad(y, [x, *trained], dy)], expected)


@pytest.mark.gpu(2)
def test_a_layer_on_the_second_device():
    module = layer().to("cuda:1")
    x, dy = (t.detach().to("cuda:1") for t in data())
    x.requires_grad_()
    expected = step(module, x, dy)
    for _ in range(4):
        assert_equal(step(module, x, dy), expected)
    assert_equal(in_a_thread(lambda: step(module, x, dy)), expected)
    assert torch.cuda.current_device() == 0
