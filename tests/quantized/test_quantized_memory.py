"""What layers over quantized weights keep: the stored tensors, scales where they are reused, and no dense weight."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers.cases import SCALING, Case, require
from helpers.quantized_layers import (
    BF16,
    FOUR_BIT,
    SCALED,
    all_equal,
    kinds,
    make_layer,
    quantized_linear,
    results,
    tokens,
)
from torch.utils.checkpoint import checkpoint

from bora_kernels import FusedBoraLinear, bora_linear, quantized, reuse_scales
from bora_kernels.ops import operators

pytestmark = pytest.mark.sampled(2)


def saved_by(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    return y, saved


@kinds
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_saves_what_the_weight_is_stored_as(kind, compiled, device):
    torch.compiler.reset()  # each kind is another graph, of which the compiler keeps a few only
    layer, x = make_layer(kind, device), tokens(device)
    y, saved = saved_by(torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer, x)
    size = layer.in_features * layer.out_features
    stored = {part.data_ptr(): part.nbytes for part in layer.weight.stored().tensors}
    assert stored.keys() <= {t.data_ptr() for t in saved}
    rest = {t.data_ptr(): t for t in saved if t.data_ptr() not in stored}
    assert all(t.numel() < size / 4 for t in rest.values())
    assert sum(stored.values()) < 0.75 * size if kind in FOUR_BIT else sum(stored.values()) < 1.2 * size
    y.sum().backward()


@kinds
def test_no_dense_weight_is_left(kind, device, monkeypatch):
    layer, x = make_layer(kind, device), tokens(device)
    made, dense = [], quantized.dense

    def noting_dense(*arguments, **options):
        weight = dense(*arguments, **options)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(quantized, "dense", noting_dense)
    y = layer(x)
    assert [weight() for weight in made] == [None]
    y.sum().backward()
    assert [weight() for weight in made] == [None, None]


@kinds
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_checkpointing(kind, use_reentrant, device):
    layer, x = make_layer(kind, device), tokens(device)
    expected = results(layer, x)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.float().square().sum().backward()
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert all_equal([y.detach(), *(t.grad for t in trained)], expected)


@pytest.fixture
def work(monkeypatch):
    """Notes each dense weight and each computation of norms."""
    made, dense, forward = [], quantized.dense, operators.forward

    def noting_dense(*arguments, **options):
        made.append(arguments[-1])
        return dense(*arguments, **options)

    def noting_forward(*arguments, **options):
        if arguments[3] is None:  # scales
            made.append("norms")
        return forward(*arguments, **options)

    monkeypatch.setattr(quantized, "dense", noting_dense)
    monkeypatch.setattr(operators, "forward", noting_forward)
    return made


@kinds
def test_a_scope_reuses_scales(kind, device, work):
    layer, x = make_layer(kind, device), tokens(device)
    changing = "scale" if kind in SCALED else "offset" if "nested" in kind else "absmax"
    expected = results(layer, x)
    work.clear()
    with reuse_scales():
        for _ in range(3):
            assert all_equal(results(layer, x), expected)
        assert work == ["forward", "norms", "backward", *["forward", "backward"] * 2]
        with torch.no_grad():
            layer.get_parameter(f"weight.{changing}").mul_(2)
        changed = results(layer, x)
    assert work.count("norms") == 2
    assert all_equal(results(layer, x), changed) and not all_equal(changed, expected)


@kinds
def test_a_scope_tells_inputs_of_other_dtypes_apart(kind, device, work):
    """The dense weight has the input's dtype, so its norms differ too."""
    layer = make_layer(kind, device)
    inputs = [tokens(device, dtype) for dtype in (BF16, torch.float32, torch.float64)]
    expected = [results(layer, x) for x in inputs]
    work.clear()
    with reuse_scales():
        for x, values in zip(inputs, expected, strict=True):
            assert all_equal(results(layer, x), values)
    assert work.count("norms") == 3


@pytest.mark.parametrize(
    "kind, backend", [*((kind, "torch") for kind in (*FOUR_BIT, *SCALED)), ("nf4-nested", "triton")]
)
def test_a_checkpoint_does_not_repeat_norms(kind, backend, device, work):
    require(backend, BF16)
    layer, x = make_layer(kind, device), tokens(device)
    layer.backend = backend
    expected = results(layer, x)
    work.clear()
    assert all_equal(results(lambda x: checkpoint(layer, x, use_reentrant=False), x, layer), expected)
    assert work == ["forward", "norms", "forward", "backward"]


@kinds
def test_compiles_without_a_break(kind, device):
    torch.compiler.reset()
    layer, x = make_layer(kind, device), tokens(device)
    assert all_equal(results(torch.compile(layer, fullgraph=True, backend="aot_eager"), x), results(layer, x))


@kinds
def test_reading_a_live_layer_compiles(kind, device):
    torch.compiler.reset()
    layer, x = make_layer(kind, device), tokens(device)
    case = Case(N=64, K=128, dtype=BF16).inputs(device)
    linear = quantized_linear(kind, case["weight"])
    factors = (layer.lora_A, layer.lora_B, layer.magnitude_row, layer.magnitude_col)

    def forward(x):
        return bora_linear(x, quantized.read(linear), *factors, scaling=SCALING)

    assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(x), forward(x))


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_gpu_peak_memory_holds_one_dense_weight(kind, device):
    """One dense weight at a time, and none between forward and backward."""
    N = K = 4096
    weight = torch.randn(N, K, device=device, dtype=BF16)
    layer = FusedBoraLinear.from_linear(quantized_linear(kind, weight), r=16)
    x = torch.randn(64, K, device=device, dtype=BF16, requires_grad=True)
    results(layer, x)
    del weight
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    assert torch.cuda.memory_allocated() - before < 0.2 * N * K
    y.float().square().sum().backward()
    # the dense weight, and the one that the column scale is folded into
    assert torch.cuda.max_memory_allocated() - before < 1.3 * 2 * (2 * N * K)
