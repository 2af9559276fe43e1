"""Layers over quantized weights against the reference on the dequantized weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import NAMES, Case, check_layer, conventions, orders, require, variants
from helpers.quantized_layers import BF16, FOUR_BIT, SCALED, kinds, make_layer, quantized_linear, results, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bora_kernels import FusedBoraLinear, FusedDoraLinear, bora_linear, quantized
from bora_kernels.ops import adapted_weight
from bora_kernels.quantized import weights

four_bit = pytest.mark.parametrize("kind", FOUR_BIT)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=NAMES.get)


# ---- the dequantized weight ----


@kinds
@dtypes
def test_dense_weight_is_the_librarys(kind, dtype, device):
    weight = torch.randn(40, 128, device=device).to(dtype)
    linear = quantized_linear(kind, weight)
    if kind in FOUR_BIT:
        expected = pytest.importorskip("bitsandbytes").functional.dequantize_4bit(linear.weight, linear.quant_state)
    elif kind == "int8":
        functional = pytest.importorskip("bitsandbytes").functional
        expected = functional.int8_vectorwise_dequant(linear.weight.CB, linear.weight.SCB)
    else:
        expected = linear.weight.dequantize()
    stored = quantized.read(linear)
    assert torch.equal(stored.dense(expected.dtype), expected)
    assert torch.equal(stored.dense(torch.float64), expected.double())
    assert 0 < (expected - weight).norm() / weight.norm() < (0.15 if kind in FOUR_BIT else 0.03)


@kinds
def test_exact_dtype_is_what_other_dtypes_are_rounded_from(kind, device):
    stored = quantized.read(quantized_linear(kind, torch.randn(40, 128, device=device).to(BF16)))
    exact = stored.layout.exact_dtype
    assert torch.equal(stored.dense(exact).double(), stored.dense(torch.float64))
    assert stored.dtype == stored.dense().dtype == stored.layout.dtype


@four_bit
@dtypes
def test_blocks_that_cross_rows(kind, dtype, device):
    """Against the table and the formula: a row of 96 is one block and a half, and the last block is half empty."""
    linear = quantized_linear(kind, torch.randn(37, 96, device=device).to(dtype))
    state, n = linear.quant_state, 37 * 96
    absmax = state.absmax
    if state.nested:
        block = torch.arange(len(absmax), device=device) // state.state2.blocksize
        absmax = state.state2.code[absmax.long()] * state.state2.absmax[block] + state.offset
    halves = torch.stack([linear.weight.data >> 4, linear.weight.data & 15], dim=-1).flatten().long()
    expected = state.code[halves] * absmax[torch.arange(n, device=device) // state.blocksize]
    assert torch.equal(quantized.read(linear).dense(), expected.view(37, 96).to(dtype))


@kinds
def test_wide_intermediates_are_made_in_blocks(kind, device, monkeypatch):
    """Nothing of the weight's size is made in float32, neither from a 8-bit weight nor for norms."""
    stored = quantized.read(quantized_linear(kind, torch.randn(40, 128, device=device).to(BF16)))
    expected = stored.dense(BF16)
    for module, name in ((weights, "CHUNK"), (adapted_weight, "CHUNK"), (adapted_weight, "_CACHED")):
        monkeypatch.setattr(module, f"{name}_ELEMENTS", 3 * 128)

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                self.largest = max(self.largest, out.numel())
            return out

    with Sizes() as sizes:
        row_norm, col_norm = adapted_weight.norms(expected)
        if kind not in FOUR_BIT:
            layout = stored.layout
            dense = weights._dequantize(*(stored.tensors, *layout[:2], layout.block_size, layout.dtype, BF16, "", ""))
            assert torch.equal(dense, expected)
    assert sizes.largest <= 3 * 128
    for norm, dim in ((row_norm, 1), (col_norm, 0)):
        torch.testing.assert_close(norm, torch.linalg.vector_norm(expected.double(), dim=dim).float())


@pytest.mark.parametrize("kind", ["nf4-nested", "torchao-int8-groups"])
def test_operator(kind, device):
    layout, stored = quantized.read(quantized_linear(kind, torch.randn(8, 64, device=device)))
    kind, shape, dtype, block_size = layout
    arguments = (list(stored), kind, list(shape), list(block_size), dtype, BF16, "", "torch")
    torch.library.opcheck(torch.ops.bora_kernels.dequantize.default, arguments)


def test_weights_of_equal_tensors_and_another_layout_are_told_apart(device):
    """With one adapter, by which a layer is recognized."""
    layer, x = make_layer("nf4", device), tokens(device)
    adapter = (layer.lora_A, layer.lora_B, layer.magnitude_row, layer.magnitude_col)
    stored = layer.weight.stored()
    turned = stored._replace(layout=stored.layout._replace(block_size=(128,)))  # reads every other absmax
    for weight in (stored, turned, stored, turned):
        y = bora_linear(x, weight, *adapter, scaling=0.5)
        assert torch.equal(y, bora_linear(x, weight.dense(BF16), *adapter, scaling=0.5))
    assert not torch.equal(stored.dense(BF16), turned.dense(BF16))


@kinds
def test_plain_steps_do_without_the_dispatcher_and_what_looks_on_sees_the_operator(kind, device):
    layer, x = make_layer(kind, device), tokens(device)
    assert [operators_in(layer, x, watched) for watched in (False, True)] == [0, 2]


def operators_in(layer, x, watched: bool) -> int:
    """How often a step asks the dispatcher for a dense weight, seen by the profiler or by a dispatch mode."""
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names() if watched else torch.profiler.profile() as profile:
        layer(x).sum().backward()
    return sum("bora_kernels" in name and "dequantize" in name for name in seen or [e.name for e in profile.events()])


# ---- output and gradients ----


def over(stored):
    """``bora_linear`` over this weight, whatever dense one comes with the other arguments."""
    return lambda weight, **rest: bora_linear(weight=stored, **rest)


def check_quantized(backend, kind, case, device, **options):
    require(backend, case.dtype)
    inputs = case.inputs(device)
    stored = quantized.read(quantized_linear(kind, inputs["weight"], inputs["bias"]))
    inputs["weight"] = stored.dense(case.dtype)

    return check_layer(backend, inputs, case.upstream(device), layer=over(stored), norm_order=case.order, **options)


@kinds
@variants
@conventions
@dtypes
def test_matches_reference(kind, member, order, detach_norm, dtype, device):
    case = Case(dtype=dtype, member=member, order=order)
    check_quantized("torch", kind, case, device, detach_norm=detach_norm)


@pytest.mark.parametrize("kind", ["nf4-nested", "fp4", "torchao-float8"])
@orders
def test_kernels_match_reference(kind, order, device):
    check_quantized("triton", kind, Case(9, 70, 96, 3, dtype=BF16, order=order), device)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=NAMES.get)
def test_other_dtypes(kind, dtype, device):
    case = Case(9, 40, 96, 3, dtype=torch.float16)
    inputs = case.inputs(device)
    stored = quantized.read(quantized_linear(kind, inputs["weight"]))
    inputs = {name: None if t is None else t.to(dtype) for name, t in inputs.items()}
    inputs["weight"] = stored.dense(dtype)
    check_layer("torch", inputs, case.upstream(device).to(dtype), layer=over(stored))


@four_bit
def test_dropout(kind, device):
    case = Case(17, 64, 96, 3)
    torch.manual_seed(3)
    keep = torch.rand(17, 96, device=device) >= 0.25
    check_quantized("torch", kind, case, device, dropout_p=0.25, training=True, seed=3, mask=keep)


@pytest.mark.parametrize("kind", [*FOUR_BIT, *SCALED[:-1]])  # torchao's float8 makes NaN of a zero row by itself
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_zero_rows_give_finite_gradients(kind, backend, device):
    weight = torch.randn(32, 64, device=device).to(BF16)
    weight[3:7] = 0
    layer = FusedBoraLinear.from_linear(quantized_linear(kind, weight), r=4)
    layer.backend = backend
    for value in results(layer, tokens(device, K=64)):
        assert value.isfinite().all()


# ---- the module ----


@kinds
@pytest.mark.parametrize("cls", [FusedBoraLinear, FusedDoraLinear])
def test_starts_as_the_dequantized_layer_and_copies_nothing(kind, cls, device):
    case = Case(N=40, K=64, dtype=BF16)
    inputs = case.inputs(device)
    linear = quantized_linear(kind, inputs["weight"], inputs["bias"])
    layer = cls.from_linear(linear, r=4)
    for own, theirs in zip(layer.weight.stored().tensors, quantized.read(linear).tensors, strict=True):
        assert own.data_ptr() == theirs.data_ptr()
    assert layer.bias is linear.bias

    stored = quantized.read(linear)
    dense = stored.dense(stored.layout.exact_dtype)  # whichever dtype an input has, no other rounds less
    for name, dim in {"magnitude_row": 1, "magnitude_col": 0}.items():
        if getattr(layer, name) is not None:
            expected = torch.linalg.vector_norm(dense.double(), dim=dim).float()
            torch.testing.assert_close(getattr(layer, name).detach(), expected)
    torch.testing.assert_close(layer.effective_weight(), stored.dense())
    assert {name for name, p in layer.named_parameters() if p.requires_grad} <= {
        "lora_A", "lora_B", "magnitude_row", "magnitude_col"
    }  # fmt: skip


def test_int8_layer_that_has_run(device):
    """Its first forward moves the scales from the weight to the layer's state."""
    linear = quantized_linear("int8", torch.randn(32, 64, device=device).half())
    before = quantized.read(linear).dense()
    linear(torch.randn(3, 64, device=device).half())
    assert torch.equal(quantized.read(linear).dense(), before)


@four_bit
@pytest.mark.parametrize("storage", [BF16, torch.float32], ids=NAMES.get)
def test_wide_storage(kind, storage, device):
    weight = torch.randn(32, 64, device=device)
    narrow = quantized.read(quantized_linear(kind, weight))
    wide = quantized.read(quantized_linear(kind, weight, quant_storage=storage))
    assert torch.equal(wide.dense(), narrow.dense())


def test_quant_state_of_the_layer_is_found(device):
    """Sharding engines replace the parameter by a plain one."""
    linear = quantized_linear("nf4", torch.randn(32, 64, device=device))
    before = quantized.read(linear).dense()
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    assert torch.equal(quantized.read(linear).dense(), before)


@pytest.mark.parametrize("compute_dtype", [BF16, None], ids=["bf16", "none"])
def test_compute_dtype(compute_dtype, device):
    weight = torch.randn(32, 64, device=device).to(BF16)
    layer = FusedBoraLinear.from_linear(quantized_linear("nf4", weight, compute_dtype=compute_dtype), r=4)
    x = torch.randn(3, 64, device=device)
    y = layer(x)
    expected = layer(x.to(BF16)).float() if compute_dtype else F.linear(x, layer.weight.stored().dense(torch.float32))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0 if compute_dtype else 1e-5, atol=0 if compute_dtype else 1e-5)


@kinds
def test_autocast(kind, device):
    layer = make_layer(kind, device)
    x = torch.randn(5, 128, device=device)
    with torch.autocast(device, dtype=BF16):
        y = layer(x)
    assert y.dtype == BF16 and torch.equal(y, layer(x.to(BF16)))
