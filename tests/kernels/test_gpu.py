"""What only a GPU shows: large sizes, compiled kernels and replayed stages, graphs, streams, sanitizers."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.cases import HALVES, NAMES, SCALING, Case, check_layer, dtypes, orders, run
from helpers.graphs import capture

from bora_kernels import bora_linear, replay_disabled
from bora_kernels.kernels import (
    combine,
    factor_terms,
    gemm,
    gram,
    low_rank,
    moments,
    moments_of_terms,
    norms,
    products,
    tail,
    terms,
    wide,
)
from bora_kernels.reference import bora_linear_ref

pytestmark = pytest.mark.gpu

BF16, FP16 = HALVES
DEVICE = "cuda"


def needs_memory(gib):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free device memory")


def triton_run(inputs, dy, **options):
    return run(bora_linear, inputs, dy, backend="triton", **{"scaling": SCALING, **options})


def assert_same_bits(actual, expected):
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), f"{name} differs"


# ---- large sizes ----

RANKS = [(8, "row_col", True), (16, "col_row", False), (64, "row_col", False), (256, "col_row", True)]
LARGE = [
    Case(2048, 4096, 4096, rank, dtype=dtype, order=order, bias=bias)
    for dtype in (BF16, FP16, torch.float32)
    for rank, order, bias in RANKS
]
LARGE += [
    Case(2048, 4096, 4096, 16, dtype=BF16, member="dora"),
    Case(2048, 4096, 4096, 16, dtype=BF16, member="lora"),
    Case(8192, 1024, 4096, 16, dtype=BF16),
    Case(1000, 4104, 1032, 12, dtype=BF16, order="col_row"),  # aligned for descriptors, ragged for tiles
    Case(1000, 4099, 1031, 13, dtype=BF16),  # aligned for nothing
    Case(1, 4096, 4096, 16, dtype=BF16),
    Case(512, 1024, 1024, 512, dtype=BF16),
    Case(512, 1024, 1024, 512, dtype=torch.float32, order="col_row"),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_layers(case):
    """Right when recorded, and the same bits in replays by single launches and as a graph, at other addresses."""
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    first = check_layer("triton", inputs, dy, norm_order=case.order)
    kept = []
    for _ in range(5):
        kept.append(triton_run(inputs, dy, norm_order=case.order))
        assert_same_bits(kept[-1], first)


@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
def test_float32_products_follow_the_setting_of_pytorch(tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    case = Case(300, 512, 384, 16)
    check_layer("triton", case.inputs(DEVICE), case.upstream(DEVICE))


@orders
def test_weight_of_more_than_2_31_elements(order):
    """An element of the weight takes 30 bytes in the dense reference, in float64 66, too many: the formulas judge."""
    needs_memory(72)
    case = Case(8, 131072 + 16, 16640, 16, dtype=BF16, order=order, bias=False)
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    assert inputs["weight"].numel() > 2**31
    options = {"scaling": SCALING, "norm_order": order}
    actual = triton_run(inputs, dy, norm_order=order)
    torch.cuda.empty_cache()  # blocks that are half in use would be in the way
    plain = run(bora_linear_ref, inputs, dy, **options)
    torch.cuda.empty_cache()
    exact = run(bora_linear, inputs, dy, dtype=torch.float64, backend="torch", **options)
    assert_accurate(actual, plain, exact, samples=8 * 16)


@pytest.mark.parametrize("N, K", [(131072, 64), (64, 131072)], ids=["output", "input"])
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_activations_of_more_than_2_31_elements(N, K, dtype):
    """Only the last tokens have a gradient, so that everything is that of a layer on those tokens alone."""
    needs_memory(60)
    M, last = 2**31 // 131072 + 64, 17
    case = Case(last, N, K, 8, dtype=dtype)
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    x = torch.randn(M, K, dtype=dtype, device=DEVICE)
    x[-last:] = inputs["x"]
    wide_dy = torch.zeros(M, N, dtype=dtype, device=DEVICE)
    wide_dy[-last:] = dy
    assert max(x.numel(), wide_dy.numel()) > 2**31
    actual = triton_run(inputs | {"x": x}, wide_dy)
    assert not actual["d_x"][:-last].any()
    actual |= {name: actual[name][-last:] for name in ("y", "d_x")}
    plain = run(bora_linear_ref, inputs, dy, scaling=SCALING)
    exact = run(bora_linear_ref, inputs, dy, dtype=torch.float64, scaling=SCALING)
    assert_accurate(actual, plain, exact, samples=min(64, last * 8))


# ---- replayed stages, streams, graphs ----


def shifted(tensor):
    """The same values, one element further: no longer aligned to 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view_as(tensor).copy_(tensor)


RELAUNCHES = {
    "plain": ({}, {}),
    "x-shifted": ({"x": shifted}, {}),
    "weight-shifted": ({"weight": shifted}, {}),
    "weight-transposed": ({"weight": lambda t: t.T.contiguous().T}, {}),
    "lora_A-shifted": ({"lora_A": shifted}, {}),
    "vectors-shifted": ({"magnitude_row": shifted, "magnitude_col": shifted, "bias": shifted}, {}),
    "half-adapters": ({name: torch.Tensor.half for name in ("lora_A", "lora_B")}, {}),
    "scaling": ({}, {"scaling": -1.0}),
    "eps": ({}, {"eps": 1.0}),
    "col_row": ({}, {"norm_order": "col_row"}),
    "detached": ({}, {"detach_norm": True}),
    "dora": ({"magnitude_col": lambda t: None}, {}),
    "nobias": ({"bias": lambda t: None}, {}),
    "frozen": ({}, {"trained": ("x", "lora_B")}),
}


@dtypes
def test_relaunches_mind_what_changed(dtype):
    """Layers of one size that differ in alignment or an option, each launched before and after the others."""
    case = Case(64, 256, 192, 16, dtype=dtype)
    for _ in range(2):
        for changes, options in RELAUNCHES.values():
            inputs = case.inputs(DEVICE)
            inputs |= {name: change(inputs[name]) for name, change in changes.items()}
            check_layer("triton", inputs, case.upstream(DEVICE), **options)


def test_what_hooks_hand_back_may_lie_otherwise():
    """save_on_cpu gives contiguous copies; a layer that met the same input without it must not take them for that."""
    case = Case(64, 256, 192, 16, dtype=BF16)
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    inputs |= {name: inputs[name].T.contiguous().T for name in ("x", "weight", "lora_A", "lora_B")}
    expected = triton_run(inputs, dy)
    for hooks in (nullcontext(), torch.autograd.graph.save_on_cpu(), nullcontext(), torch.autograd.graph.save_on_cpu()):
        with hooks:
            results = triton_run(inputs, dy)
        for name, value in results.items():
            torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@dtypes
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_no_synchronization_with_the_host(backend, dtype, dropout_p):
    case = Case(256, 512, 384, 16, dtype=dtype)
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    options = {"scaling": SCALING, "backend": backend, "dropout_p": dropout_p, "training": True}
    run(bora_linear, inputs, dy, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(bora_linear, inputs, dy, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream():
    case = Case(256, 512, 384, 16, dtype=BF16)
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    expected = triton_run(inputs, dy)
    late = inputs | {"x": torch.zeros_like(inputs["x"])}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whoever does not wait for this stream reads zeros
        late["x"].copy_(inputs["x"])
        actual = triton_run(late, dy)
    stream.synchronize()
    assert_same_bits(actual, expected)


@orders
@dtypes
def test_same_bits_over_five_runs(order, dtype):
    case = Case(2048, 1024, 1536, 16, dtype=dtype)
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    first = triton_run(inputs, dy, norm_order=order)
    for _ in range(4):
        assert_same_bits(triton_run(inputs, dy, norm_order=order), first)


OVERLAPPING = [
    Case(512, 4096, 4096, 16, dtype=BF16),
    Case(600, 512, 3584, 64, dtype=BF16, order="col_row"),
    Case(5000, 3584, 512, 16, dtype=BF16),  # products in two launches
    Case(64, 256, 192, 8, dtype=FP16),
    Case(100, 384, 640, 24),
    Case(700, 640, 1536, 32, dtype=BF16),
    Case(300, 1024, 2048, 256, dtype=BF16),  # terms of factors, a Gram matrix and products of their own
    Case(90, 1504, 640, 100, dtype=BF16, order="col_row"),
]


def captured(inputs, dy, **options):
    """A CUDA graph of forward and backward over these very tensors, and the results it writes."""
    return capture(lambda: triton_run(inputs, dy, **options))


@orders
def test_graph_replay_with_other_values(order):
    case, other = (Case(256, 512, 384, 16, dtype=BF16, order=order, seed=seed) for seed in (0, 1))
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    graph, results = captured(inputs, dy, norm_order=order)
    new_inputs, new_dy = other.inputs(DEVICE), other.upstream(DEVICE)
    for name, tensor in inputs.items():
        tensor.copy_(new_inputs[name])
    dy.copy_(new_dy)
    graph.replay()
    assert_same_bits(results, triton_run(new_inputs, new_dy, norm_order=order))


@pytest.mark.parametrize("options", [{}, {"detach_norm": True}, {"dropout_p": 0.25, "training": True}], ids=str)
@pytest.mark.parametrize("case", OVERLAPPING, ids=str)
def test_launches_that_overlap_wait_for_what_they_read(case, options, monkeypatch):
    """The bits of launches one after the other, one by one, as a graph and captured, over inputs that change."""
    case_of = [replace(case, seed=seed) for seed in range(3)]
    inputs, dys = [each.inputs(DEVICE) for each in case_of], [each.upstream(DEVICE) for each in case_of]

    def run_of(inputs, dy):
        torch.manual_seed(0)
        return triton_run(inputs, dy, norm_order=case.order, **options)

    with monkeypatch.context() as patch, replay_disabled():
        for module in (
            combine, factor_terms, gemm, gram, low_rank, moments, moments_of_terms, norms, products, tail, terms, wide
        ):  # fmt: skip
            patch.setattr(module, "overlapping", lambda *_, **__: {"OVERLAP": False})
        expected = [run_of(*each) for each in zip(inputs, dys, strict=True)]
    for disabled in (True, False):
        with replay_disabled() if disabled else nullcontext():
            for _ in range(3):
                for each, dy, results in zip(inputs, dys, expected, strict=True):
                    assert_same_bits(run_of(each, dy), results)
    if not options.get("training"):  # a graph draws a mask of its own
        static, dy = {name: value.clone() for name, value in inputs[0].items()}, dys[0].clone()
        graph, results = captured(static, dy, norm_order=case.order, **options)
        for number in (1, 2, 0, 2, 1):
            for name, value in inputs[number].items():
                static[name].copy_(value)
            dy.copy_(dys[number])
            for _ in range(2):
                graph.replay()
            assert_same_bits(results, expected[number])


def test_graph_replays_draw_new_dropout():
    case = Case(256, 512, 384, 16, dtype=BF16)
    inputs, dy = case.inputs(DEVICE), case.upstream(DEVICE)
    graph, results = captured(inputs, dy, dropout_p=0.5, training=True)
    graph.replay()
    first = results["y"].clone()
    graph.replay()
    assert not torch.equal(results["y"], first)
