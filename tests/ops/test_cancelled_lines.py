"""Long rows and columns of W0 that the update cancels: all is right to a fraction of what is left of them."""

import pytest
import torch
from conftest import CUDA, INTERPRETING
from helpers.accuracy import assert_equal
from helpers.cases import (
    HALVES,
    NAMES,
    SCALING,
    Case,
    backends,
    cancelled,
    check_layer,
    check_together,
    conventions,
    dtypes,
    orders,
    require,
    run,
    undone,
    variants,
)
from helpers.graphs import capture

from bora_kernels import bora_linear
from bora_kernels.contract import COMPLETE, Adapter, Options, split_scales
from bora_kernels.ops import operators, torch_backend

pytestmark = pytest.mark.sampled(12)
# What norms may err beside twice the error of float32 sums: the products of a bf16 weight are made of two bf16 terms.
BOUNDS = {torch.float32: 4e-6, torch.float16: 4e-6, torch.bfloat16: 2e-5}


@pytest.fixture(params=["torch", "torch as on a GPU", "triton"])
def backend(request, monkeypatch):
    """Each backend, and on a CPU what PyTorch's operations do on a GPU: products of rounded operands, or of V."""
    name = request.param
    if name == "torch as on a GPU":
        if CUDA:
            pytest.skip("it is what the torch backend does here")
        name = "torch"
        monkeypatch.setattr(torch_backend, "_reads_word", lambda _: False)
        monkeypatch.setattr(torch_backend, "_has_wide_products", lambda _: True)
        monkeypatch.setattr(torch_backend, "_wide_product", lambda t, matrix, **_: t.float() @ matrix.float())
    return name


def scales(inputs, backend, order, dtype=None):
    """Norms and scales."""
    return all_scales(inputs, backend, order, dtype)[:4]


def word(inputs, backend, order):
    """What norms say of cancelled lines."""
    return all_scales(inputs, backend, order).cancelled


def all_scales(inputs, backend, order, dtype=None):
    inputs = {name: t for name, t in inputs.items() if name != "bias"}
    tensors = {name: t if dtype is None else t.to(dtype) for name, t in inputs.items()}
    adapter = Adapter(*(tensors[name] for name in Adapter._fields))
    options = Options(SCALING, order, backend=backend)
    made = operators.forward(
        tensors["x"], tensors["weight"], adapter, None, None, None, options, products=True, save_product=False
    )[3]
    return split_scales(made, inputs["weight"].shape, inputs["lora_A"].shape[0], adapter.members)


@backends
@orders
@dtypes
@pytest.mark.parametrize("left", [0.3, 1e-3])
@pytest.mark.parametrize("axis", ["row", "col"])
@pytest.mark.parametrize("N, K, R", [(40, 70, 5), (35, 33, 20)])
def test_norms(backend, order, dtype, left, axis, N, K, R, device):
    require(backend, dtype)
    inputs = cancelled(Case(4, N, K, R, dtype=dtype, bias=False).inputs(device), axis, left)
    exact = scales(inputs, "torch", order, torch.float64)
    plain = scales(inputs, "torch", order, torch.float32)
    for name, value, one, true in zip(("ρ", "a", "γ", "g"), scales(inputs, backend, order), plain, exact, strict=True):
        error, plain_error = (((t - true) / true).abs().max().item() for t in (value, one))
        assert error <= 2 * plain_error + BOUNDS[dtype], (name, NAMES[dtype], error, plain_error)


@dtypes
@variants
@pytest.mark.parametrize("axis, left", [("row", 0.05), ("row", 1e-3), ("col", 0.2), ("col", 1e-3)])
def test_layers(backend, dtype, member, order, axis, left, device):
    """Outputs and gradients; a difference of W0's and the update's errs √K times more, and far more if rounded."""
    require(backend, dtype)
    for seed, (N, K, R) in enumerate([(40, 70, 14), (48, 66, 20)]):
        case = Case(21, N, K, R, dtype=dtype, member=member, order=order, bias=seed == 0, seed=seed)
        check_layer(backend, undone(case.inputs(device), axis, left), case.upstream(device), norm_order=order)


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@orders
@pytest.mark.parametrize("axis", ["row", "col"])
@conventions
def test_ranks_1_and_2(backend, detach_norm, dtype, order, axis, device):
    """One number is nearly all that the line's own factor gets; with detached norms no rounding of S or D is in it."""
    require(backend, dtype)
    layers = []
    for seed in range(4 if backend == "triton" and INTERPRETING else 24):
        N, K = torch.randint(20, 90, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        case = Case(36, N, K, 1 + seed % 2, dtype=dtype, order=order, bias=False, seed=seed)
        left = (0.05, 1e-3)[seed // 2 % 2]
        layers.append((undone(case.inputs(device), axis, left), case.upstream(device)))
    own = "d_lora_B" if axis == "row" else "d_lora_A"
    shares = {own: 0.01} if detach_norm else {}  # nothing would average what rounding took of the projections
    check_together(backend, layers, shares=shares, norm_order=order, detach_norm=detach_norm)


@conventions
@variants
@pytest.mark.parametrize("axis, left", [("row", 0.01), ("col", 1e-3)])
def test_gradients_of_0(backend, detach_norm, member, order, axis, left, device):
    """A line that keeps W0's direction: what its factor's own column gets cancels in exact gradients."""
    require(backend, torch.float32)
    for seed, (N, K, R) in enumerate([(26, 50, 1), (61, 20, 17)]):
        case = Case(9, N, K, R, member=member, order=order, bias=seed == 0, seed=seed)
        inputs, dy = cancelled(case.inputs(device), axis, left), case.upstream(device)
        check_layer(backend, inputs, dy, norm_order=order, detach_norm=detach_norm)


@dtypes
@orders
def test_a_row_and_a_column_with_detached_norms(backend, dtype, order, device):
    """Of two ranks, beside 22 others. Factors' gradients are left out: where both lines meet is nearly all of them."""
    require(backend, dtype)
    case = Case(30, 45, 61, 24, dtype=dtype, order=order, seed=4)
    inputs = undone(case.inputs(device), "row", 0.02)
    A, B, W = inputs["lora_A"], inputs["lora_B"], inputs["weight"].float()
    A[5] = 0.0
    column = W[:, 3] + SCALING * B @ A[:, 3]
    A[5, 3], B[:, 5] = -1 / SCALING, 0.99 * column
    V = W + SCALING * B @ A
    assert V[1].norm() < 0.03 * W[1].norm() and V[:, 3].norm() < 0.011 * column.norm()
    trained = ("x", "magnitude_row", "magnitude_col")
    check_layer(backend, inputs, case.upstream(device), norm_order=order, detach_norm=True, trained=trained)


@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_a_rank_that_undoes_all_of_its_rows(backend, order, dtype, device):
    """W0 of rank 2 whose rows are brought down to 1 % of themselves, all of them.

    A few numbers are most of a gradient of one such layer, so several are held to the rule together.
    """
    layers = []
    for seed in range(12 if backend == "triton" and INTERPRETING else 24):
        case = Case(25, 37, 58, 3, dtype=dtype, order=order, bias=False, seed=seed)
        inputs = case.inputs(device)
        A, B = inputs["lora_A"], inputs["lora_B"]
        inputs["weight"] = (-SCALING * B[:, :2] @ A[:2]).to(dtype)
        B[:, 2] *= 0.01
        layers.append((inputs, case.upstream(device)))
    check_together(backend, layers, norm_order=order)


@pytest.mark.parametrize("axis", ["row", "col"])
def test_float64(axis, device):
    case = Case(12, 29, 50, 4, dtype=torch.float64, seed=6)
    check_layer("torch", cancelled(case.inputs(device), axis, 1e-3), case.upstream(device))


@pytest.mark.parametrize("axis", ["row", "col"])
def test_under_autocast(backend, axis, device):
    """A float32 weight meets bfloat16 inputs: rounding it alone would leave nothing of such a line."""
    dtype = torch.bfloat16
    require(backend, dtype)
    case = Case(40, 34, 47, 6, dtype=dtype, seed=7)
    inputs = case.inputs(device)
    inputs["weight"] = torch.randn(34, 47, generator=torch.Generator(device).manual_seed(7), device=device) / 7
    inputs = undone(inputs, axis, 5e-3)

    def layer(**arguments):
        with torch.autocast(torch.device(device).type, dtype):
            return bora_linear(**arguments)

    check_layer(backend, inputs, case.upstream(device), layer=layer)


@backends
@orders
@dtypes
def test_word_of_cancelled_lines(backend, order, dtype, device):
    """Left by the norms, and only where there are such lines: ordinary layers take no more time."""
    require(backend, dtype)
    if backend == "torch" and (dtype in HALVES) != CUDA:
        pytest.skip("on a CPU half precision needs no word, and on a GPU nothing else does")
    case = Case(4, 40, 57, 5, dtype=dtype, order=order, bias=False, seed=8)
    ordinary = case.inputs(device)
    large = ordinary | {"lora_B": 30 * ordinary["lora_B"]}
    zero = ordinary | {"weight": ordinary["weight"].clone(), "lora_B": ordinary["lora_B"].clone()}
    zero["weight"][3], zero["lora_B"][3] = 0.0, 0.0
    for inputs in (ordinary, large, zero):
        assert not word(inputs, backend, order).any()
    rows_first = order == "row_col"
    for axis in ("row", "col"):
        first, second = word(cancelled(ordinary, axis, 0.1), backend, order)[:2].bool().tolist()
        assert first if (axis == "row") == rows_first else second


def test_lines_cancel_with_the_same_bits_each_time(backend, device):
    case = Case(16, 70, 65, 5, seed=9)
    inputs, dy = cancelled(case.inputs(device), "row", 1e-3), case.upstream(device)
    one, other = (run(bora_linear, inputs, dy, scaling=SCALING, backend=backend) for _ in range(2))
    assert_equal(one, other)


def test_of_a_sharded_weight(backend, device):
    """Norms, their word, and the paths through them, with the whole weight as the only shard."""
    require(backend, torch.float32)
    from bora_kernels.ops.adapted_weight import norm_paths
    from bora_kernels.ops.sharded import norms as sharded

    for axis, order in (("row", "row_col"), ("col", "row_col"), ("row", "col_row"), ("col", "col_row")):
        case = Case(4, 40, 57, 5, order=order, seed=10)
        inputs = cancelled(case.inputs(device), axis, 1e-3)
        dm = torch.randn(40, device=device), torch.randn(57, device=device)
        results = []
        for name, dtype in ((backend, None), ("torch", None), ("torch", torch.float64)):
            weight = inputs["weight"].to(dtype)
            adapter = Adapter(*(inputs[field].to(dtype) for field in Adapter._fields))
            options = Options(SCALING, order, backend=name)
            scales = sharded.norms_and_scales(weight, adapter, options, COMPLETE)
            zeros = torch.zeros_like(adapter.lora_A), torch.zeros_like(adapter.lora_B)
            wide = [t.to(weight.dtype) for t in dm]
            if dtype is None:
                results.append(sharded.add_norm_paths(weight, adapter, scales, *wide, *zeros, options))
            else:
                results.append(norm_paths(weight, adapter, scales, *wide, options))
        for actual, plain, exact in zip(*results, strict=True):
            error, plain_error = (((t - exact).norm() / exact.norm()).item() for t in (actual, plain))
            assert error <= 4 * plain_error + 1e-6, (axis, order, error, plain_error)


@pytest.mark.gpu
@orders
@dtypes
@pytest.mark.parametrize("R", [16, 40])
@pytest.mark.parametrize("axis", ["row", "col"])
def test_large_layers(backend, order, dtype, R, axis, device):
    for left in (0.05, 1e-3):
        case = Case(512, 1024, 2048, R, dtype=dtype, order=order, bias=False, seed=R)
        check_layer(backend, undone(case.inputs(device), axis, left), case.upstream(device), norm_order=order)


@pytest.mark.gpu
@dtypes
def test_a_graph_of_a_layer_whose_lines_cancel_later(backend, dtype, device):
    """What a CUDA graph was captured with says nothing of the lines that it meets."""
    case = Case(64, 96, 160, 12, dtype=dtype, seed=11)
    inputs, dy = case.inputs(device), case.upstream(device)
    leaves = {name: t.clone().requires_grad_(name != "weight") for name, t in inputs.items()}
    trained = [t for t in leaves.values() if t.requires_grad]

    def step():
        y = bora_linear(**leaves, scaling=SCALING, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, trained, dy)]

    graph, results = capture(step)
    with torch.no_grad():
        for name, t in undone(inputs, "row", 1e-3).items():
            leaves[name].copy_(t)
    graph.replay()
    torch.cuda.synchronize()
    expected = check_layer(backend, {name: t.detach() for name, t in leaves.items()}, dy)
    for one, other in zip(results, expected.values(), strict=True):
        assert torch.equal(one, other)
