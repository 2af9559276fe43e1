"""The backward of a gated MLP in one read of e, f and dh against the twin: kinds of layers, and when it is taken."""

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.cases import Case, dtypes, require

pytest.importorskip("triton")

from bora_kernels.blocks import Projection, gated_mlp, mlp_kernels, reference
from bora_kernels.contract import Adapter, Options

pytestmark = pytest.mark.sampled(2)
K, I, N = 36, 40, 33
BORA = ("bora", "row_col", False)
KINDS = {
    "bora": (BORA, ("bora", "col_row", False), BORA),
    "detached": (("bora", "row_col", True),) * 3,
    "mixed": (("dora", "row_col", False), ("columns", "row_col", False), ("lora", "row_col", False)),
    "frozen gate": (None, BORA, ("dora", "row_col", True)),
    "frozen up and down": (BORA, None, None),
}


@pytest.fixture
def taken(monkeypatch):
    """What calls of the backward in one pass leave behind."""
    calls, own = [], mlp_kernels.backward
    monkeypatch.setattr(mlp_kernels, "backward", lambda *args: (calls.append(True), own(*args))[1])
    return calls


def layers(kinds, dtype, device, ranks=(3, 4, 5), bias_of_up=False):
    made = []
    for i, (kind, shape) in enumerate(zip(kinds, ((I, K), (I, K), (N, I)), strict=True)):
        member, order, detach_norm = kind or BORA
        bias = i == 2 or (i == 1 and bias_of_up)
        drawn = Case(1, *shape, ranks[i], dtype, member, order, bias=bias, seed=i).inputs(device)
        adapter = Adapter(*[drawn[name] for name in ("lora_A", "lora_B", "magnitude_row", "magnitude_col")])
        options = Options(0.5, order, detach_norm, backend="triton")
        made.append(Projection(drawn["weight"], drawn["bias"], adapter if kind else None, options))
    return made


def run(function, x, dy, projections, activation, dtype, needs_dx=True):
    """The output and all gradients, in this dtype; parameters of adapters stay float32 below float64."""
    x = x.to(dtype).detach().requires_grad_(needs_dx)
    named, own = {"x": x} if needs_dx else {}, []
    for i, (weight, bias, adapter, options, _) in enumerate(projections):
        if adapter is not None:
            adapter = adapter.map(lambda t: (t.double() if dtype == torch.float64 else t.clone()).requires_grad_())
            named |= {f"{i}.{name}": t for name, t in adapter._asdict().items() if t is not None}
        own.append(Projection(weight.to(dtype), None if bias is None else bias.to(dtype), adapter, options))
    y = function(x, *own, activation)
    gradients = torch.autograd.grad(y, list(named.values()), dy.to(dtype))
    return {"y": y.detach(), **dict(zip(named, gradients, strict=True))}


def check(projections, activation, dtype, device, needs_dx=True):
    x, dy = torch.randn(2, 11, K, device=device).to(dtype), torch.randn(2, 11, N, device=device).to(dtype)
    rest = (x, dy, projections, activation)
    actual = run(gated_mlp, *rest, dtype, needs_dx)
    twins = [run(reference.gated_mlp_ref, *rest, wide, needs_dx) for wide in (dtype, torch.float64)]
    assert_accurate(actual, *twins, samples=min(t.numel() for t in actual.values()))
    return actual


@pytest.mark.parametrize("kinds", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_every_kind_of_layer(kinds, activation, taken, device):
    check(layers(kinds, torch.float32, device), activation, torch.float32, device)
    assert taken


@dtypes
def test_dtypes_and_the_same_bits_again(dtype, taken, device):
    require("triton", dtype)
    projections = layers(KINDS["bora"], dtype, device)
    torch.manual_seed(1)
    first = check(projections, "silu", dtype, device)
    torch.manual_seed(1)
    second = check(projections, "silu", dtype, device)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert bool(taken) == (dtype != torch.float16)  # whose products lie apart from the outputs


def test_a_first_block_without_a_gradient_of_x(taken, device):
    check(layers(KINDS["bora"], torch.float32, device), "silu", torch.float32, device, needs_dx=False)
    assert taken


@pytest.mark.parametrize("what", [{"bias_of_up": True}, {"ranks": (3, 33, 3)}], ids=["bias", "rank"])
def test_layers_one_by_one_where_the_kernel_does_not_take_them(what, taken, device):
    check(layers(KINDS["bora"], torch.float32, device, **what), "silu", torch.float32, device)
    assert not taken


def test_rows_that_are_zero_or_scaled_by_zero(taken, device):
    projections = layers(KINDS["bora"], torch.float32, device)
    for projection in projections:
        projection.weight[2], projection.adapter.lora_B[2] = 0.0, 0.0
        projection.adapter.magnitude_row[3] = 0.0
        projection.adapter.magnitude_col[4] = 0.0
    check(projections, "silu", torch.float32, device)
    assert taken
