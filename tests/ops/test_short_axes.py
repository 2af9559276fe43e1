"""Weights with few rows or columns: heads for regression, rewards and classes, whose base an update can cancel.

What is left of a row, of a column or of all of W0 is held to the accuracy rule with its ordinary floor.
"""

import itertools

import pytest
import torch
from helpers.cases import (
    HALVES,
    NAMES,
    VARIANTS,
    Case,
    backends,
    cancelled,
    check_layer,
    conventions,
    dtypes,
    orders,
    require,
)
from torch.nn.functional import mse_loss

from bora_kernels import FusedBoraLinear, FusedDoraLinear, bora_linear
from bora_kernels.contract import SHORT_AXIS

BF16 = torch.bfloat16
SHAPES = [(1, 33), (33, 1), (1, 1), (2, 300), (130, 3), (5, 8), (SHORT_AXIS, 40)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "N{}-K{}".format(*shape))


@backends
@orders
@dtypes
@shapes
def test_any_short_axis(backend, order, dtype, shape, device):
    """A norm over one element cancels all but its sign: exact gradients of 0 are what is left of large terms."""
    case = Case(9, *shape, 3, dtype=dtype, order=order)
    check_layer(backend, case.inputs(device), case.upstream(device), norm_order=order)


@backends
@conventions
@dtypes
@pytest.mark.parametrize("member, order", VARIANTS, ids=map("-".join, VARIANTS))
@pytest.mark.parametrize("axis, left", [("row", 0.1), ("row", 1e-3), ("col", 0.02), ("col", 1e-3)])
def test_lines_that_the_update_cancels(backend, detach_norm, dtype, member, order, axis, left, device):
    for seed, (N, K, R) in enumerate([(1, 50, 1), (3, 70, 4), (60, 2, 20), (SHORT_AXIS, 33, 7)]):
        case = Case(21, N, K, R, dtype=dtype, member=member, order=order, bias=N % 2 == 0, seed=seed)
        inputs = cancelled(case.inputs(device), axis, left)
        check_layer(backend, inputs, case.upstream(device), norm_order=order, detach_norm=detach_norm)


@backends
@orders
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_zero_and_tiny_magnitudes(backend, order, size, device):
    case = Case(9, 3, 53, 3, bias=False)
    inputs = case.inputs(device)
    inputs["magnitude_row"][1:] = size
    inputs["magnitude_col"][5:7] = 0.0
    results = check_layer(backend, inputs, case.upstream(device), norm_order=order)
    assert results["d_magnitude_col"][5:7].abs().min() > 0


@backends
@orders
@dtypes
def test_zero_rows_and_columns(backend, order, dtype, device):
    case = Case(9, 4, 53, 3, dtype=dtype)
    inputs = case.inputs(device)
    inputs["weight"][2], inputs["lora_B"][2] = 0.0, 0.0
    inputs["weight"][:, 7], inputs["lora_A"][:, 7] = 0.0, 0.0
    inputs["magnitude_row"][2] = inputs["magnitude_col"][7] = 0.0
    check_layer(backend, inputs, case.upstream(device), norm_order=order)


@backends
def test_dropout(backend, device):
    """Of a mask that was drawn from the same seed."""
    require(backend, torch.float32)
    case, p = Case(37, 3, 40, 40, member="lora", bias=False), 0.3
    eye = {"x": torch.ones(37, 40, device=device), "weight": torch.zeros(3, 40, device=device)}
    probe = {"lora_A": torch.eye(40, device=device), "magnitude_row": None, "magnitude_col": None}
    options = {"dropout_p": p, "training": True}
    columns = []
    for start in range(0, 40, 3):
        lora_B = torch.zeros(3, 40, device=device)
        for i in range(min(3, 40 - start)):
            lora_B[i, start + i] = 1.0
        torch.manual_seed(5)
        columns.append(bora_linear(**eye, **probe, lora_B=lora_B, scaling=1.0, backend=backend, **options))
    mask = torch.cat(columns, 1)[:, :40] != 0
    assert 0.6 < mask.float().mean() < 0.8
    for member, order in VARIANTS:
        for dtype in (torch.float32, BF16):
            case = Case(37, 3, 40, 4, dtype=dtype, member=member)
            dy = case.upstream(device)
            check_layer(backend, case.inputs(device), dy, mask=mask, seed=5, norm_order=order, **options)


@backends
def test_autocast_and_inputs_of_other_shapes(backend, device):
    layer = FusedBoraLinear(40, 3, r=4, device=device)
    layer.backend = backend
    x = torch.randn(2, 5, 40, device=device)
    with torch.autocast(torch.device(device).type, BF16):
        y = layer(x)
    assert y.dtype == BF16 and y.shape == (2, 5, 3)
    assert layer(x[0, 0]).shape == (3,) and layer(x[:0]).shape == (0, 5, 3)
    y.float().sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@backends
def test_compiled(backend, device):
    layer = FusedBoraLinear(40, 3, r=4, device=device, dtype=BF16)
    torch.nn.init.normal_(layer.lora_B)
    layer.backend = backend
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, results = torch.randn(6, 40, device=device).to(BF16), []
    for call in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        trained = [p for p in layer.parameters() if p.requires_grad]
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [leaf, *trained])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def losses(make, N, K, backend, dtype, device, steps=40):
    """Losses and gradient norms of a head that learns to pick features, by AdamW at 1e-3."""
    torch.manual_seed(N)
    head = torch.nn.Linear(K, N, device=device, dtype=BF16)
    with torch.no_grad():
        head.weight *= 0.1  # as heads often start: elements change their signs in these steps
    layer = make.from_linear(head, r=8, alpha=16)
    layer = layer.double() if dtype == torch.float64 else layer
    layer.backend = backend
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer, seen = torch.optim.AdamW(trained, lr=1e-3), []
    generator = torch.Generator(device).manual_seed(1)
    for _ in range(steps):
        x = torch.randn(64, K, device=device, generator=generator).to(BF16).to(dtype)
        loss = mse_loss(layer(x).to(torch.float64), x[:, :N].to(torch.float64))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1e30)
        optimizer.step()
        seen.append((loss.item(), norm.item()))
    return torch.tensor(seen)


def check_training(make, N, K, backend, device):
    """Beside the reference in float64, and no farther from it than the reference in the same dtypes, nearly."""
    require(backend, BF16)
    exact = losses(make, N, K, "reference", torch.float64, device)
    plain = losses(make, N, K, "reference", BF16, device)
    actual = losses(make, N, K, backend, BF16, device)
    error, plain_error = ((t - exact).norm(dim=0) / exact.norm(dim=0) for t in (actual, plain))
    assert (error <= 2 * plain_error + 1e-3).all(), (error, plain_error)
    assert (actual.amax(0) <= 1.1 * exact.amax(0)).all(), actual


@backends
@pytest.mark.parametrize("make", [FusedBoraLinear, FusedDoraLinear])
@pytest.mark.parametrize("N", [1, 2, 3])
def test_heads_train_as_the_reference_does(backend, make, N, device):
    check_training(make, N, 48, backend, device)


@pytest.mark.gpu
@pytest.mark.parametrize("N, backend", list(itertools.product([1, 2, 3], ["torch", "triton"])))
def test_wide_heads_train_as_the_reference_does(backend, N, device):
    check_training(FusedBoraLinear, N, 4096, backend, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=NAMES.get)
@pytest.mark.parametrize("shape", [(1, 4096), (3, 4096), (4096, 1)], ids=str)
def test_large_heads(dtype, shape, device):
    for left in (0.1, 1e-3):
        case = Case(256, *shape, 8, dtype=dtype)
        check_layer("triton", cancelled(case.inputs(device), "col", left), case.upstream(device))


@pytest.mark.gpu
def test_in_a_cuda_graph(device):
    layer = FusedBoraLinear(512, 3, r=4, device=device, dtype=BF16)
    x = torch.randn(8, 512, device=device, dtype=BF16, requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    x.grad, graph = None, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.sum().backward()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    assert torch.equal(y, layer(x))
