"""Layers over quantized weights against the reference on the dequantized weight, and what they keep of it."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import NAMES, SCALING, Case, check_layer, conventions, orders, require, variants
from quantized_layers import FOUR_BIT, SCALED, dense_linear, kinds, quantized_linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bora_kernels import FusedBoraLinear, FusedDoraLinear, bora_linear, factored, quantized
from bora_kernels.reference import bora_weight_ref

BF16 = torch.bfloat16
four_bit = pytest.mark.parametrize("kind", FOUR_BIT)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=NAMES.get)


def make_layer(kind, device, seed=0, **options):
    """A bfloat16 layer [64, 128] after some training, over a base of its own."""
    inputs = Case(N=64, K=128, R=4, dtype=BF16, seed=seed).inputs(device)
    layer = FusedBoraLinear.from_linear(
        quantized_linear(kind, inputs["weight"], inputs["bias"]), r=4, alpha=2, **options
    )
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(layer, name).copy_(inputs[name])
        layer.magnitude_row.mul_(1 + 0.1 * torch.randn(64, device=device))
    return layer


def tokens(device, dtype=BF16, K=128):
    return torch.randn(5, K, device=device, dtype=dtype, requires_grad=True)


def results(layer, x):
    """The output and all gradients."""
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), trained)]


def parts(layer):
    return [part.clone() for part in layer.weight.stored().parts]


def all_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
    for module in (quantized, factored):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * 128)

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                self.largest = max(self.largest, out.numel())
            return out

    with Sizes() as sizes:
        row_norm, col_norm = factored.norms(expected)
        if kind not in FOUR_BIT:
            layout = stored.layout
            dense = quantized._dequantize(*(stored.parts, *layout[:2], layout.block_size, layout.dtype, BF16, "", ""))
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
    for own, theirs in zip(layer.weight.stored().parts, quantized.read(linear).parts, strict=True):
        assert own.data_ptr() == theirs.data_ptr()
    assert layer.bias is linear.bias

    dense = quantized.read(linear).dense()
    for name, dim in {"magnitude_row": 1, "magnitude_col": 0}.items():
        if getattr(layer, name) is not None:
            expected = torch.linalg.vector_norm(dense.double(), dim=dim).float()
            torch.testing.assert_close(getattr(layer, name).detach(), expected)
    torch.testing.assert_close(layer.effective_weight(), dense)
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


# ---- what is kept ----


def saved_by(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    return y, saved


@kinds
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_saves_what_the_weight_is_stored_as(kind, compiled, device):
    layer, x = make_layer(kind, device), tokens(device)
    y, saved = saved_by(torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer, x)
    size = layer.in_features * layer.out_features
    stored = {part.data_ptr(): part.nbytes for part in layer.weight.stored().parts}
    assert stored.keys() <= {t.data_ptr() for t in saved}
    rest = {t.data_ptr(): t for t in saved if t.data_ptr() not in stored}
    assert all(t.numel() < size / 4 for t in rest.values())
    assert sum(stored.values()) < 0.75 * size if kind in FOUR_BIT else sum(stored.values()) < 1.2 * size
    y.sum().backward()


@kinds
def test_no_dense_weight_is_left(kind, device, monkeypatch):
    layer, x = make_layer(kind, device), tokens(device)
    made, dense = [], quantized.dense

    def noting_dense(*arguments):
        weight = dense(*arguments)
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


@kinds
def test_compiles_without_a_break(kind, device):
    layer, x = make_layer(kind, device), tokens(device)
    assert all_equal(results(torch.compile(layer, fullgraph=True, backend="aot_eager"), x), results(layer, x))


@kinds
def test_reading_a_live_layer_compiles(kind, device):
    layer, x = make_layer(kind, device), tokens(device)
    case = Case(N=64, K=128, dtype=BF16).inputs(device)
    linear = quantized_linear(kind, case["weight"])
    factors = (layer.lora_A, layer.lora_B, layer.magnitude_row, layer.magnitude_col)

    def forward(x):
        return bora_linear(x, quantized.read(linear), *factors, scaling=SCALING)

    assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(x), forward(x))


# ---- copies and files ----


@kinds
def test_copies_and_pickles(kind, device):
    layer, x = make_layer(kind, device), tokens(device)
    expected = results(layer, x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert all_equal(results(twin, x), expected)
        assert all_equal(parts(twin), parts(layer))
        assert twin.weight.stored().parts[0].data_ptr() != layer.weight.stored().parts[0].data_ptr()


@kinds
def test_change_of_dtype_leaves_the_stored_tensors(kind, device):
    layer = make_layer(kind, device)
    before = parts(layer)
    layer.half()
    assert layer.lora_A.dtype == torch.float16
    assert all_equal(parts(layer), before) and [p.dtype for p in parts(layer)] == [p.dtype for p in before]
    assert layer(torch.randn(3, 128, device=device).half()).isfinite().all()


@kinds
def test_state_dict_through_a_file(kind, device, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    layer, x = make_layer(kind, device), tokens(device)
    other = make_layer(kind, device, seed=7)
    assert not all_equal(parts(other), parts(layer))
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert all_equal(results(other, x), results(layer, x))


def test_state_dict_of_another_layout_is_refused(device):
    layer, other = (make_layer(kind, device) for kind in ("nf4", "fp4"))
    with pytest.raises(ValueError, match=r'state_dict must hold a weight of layout \["nf4".*got \["fp4"'):
        layer.load_state_dict(other.state_dict())


# ---- merging ----


@kinds
@orders
def test_merge_and_unmerge(kind, order, device):
    layer, x = make_layer(kind, device, norm_order=order), tokens(device)
    before, stored, keys = results(layer, x), parts(layer), list(layer.state_dict())
    base = layer.weight.stored().dense(layer.weight.dtype)
    exact = bora_weight_ref(
        base.double(), *(getattr(layer, n).detach().double() for n in ("lora_A", "lora_B", "magnitude_row")),
        layer.magnitude_col.detach().double(), scaling=layer.scaling, norm_order=order,
    )  # fmt: skip
    for _ in range(5):
        layer.merge()
        assert layer.merged and list(layer.state_dict()) == keys
        merged = layer.merged_weight
        y = layer(x)
        layer.unmerge()
    assert merged.dtype == layer.weight.dtype and not layer.merged
    assert (merged.double() - exact).norm() <= torch.finfo(merged.dtype).eps / 2 * exact.norm()
    assert torch.equal(y, F.linear(x, merged.to(x.dtype), layer.bias))
    assert all_equal(parts(layer), stored) and all_equal(results(layer, x), before)

    linear = layer.to_linear()
    assert type(linear) is nn.Linear and torch.equal(linear.weight, merged)


@kinds
def test_merge_requantized(kind, device):
    layer, x = make_layer(kind, device), tokens(device)
    stored, keys, merged = parts(layer), list(layer.state_dict()), layer.effective_weight()
    if kind == "torchao-int8-groups":
        with pytest.raises(ValueError, match="requantize needs a scale for each row"):
            layer.merge(requantize=True)
        assert not layer.merged
        return
    layer.merge(requantize=True)
    again = quantized.read(quantized_linear(kind, merged)).dense(BF16)
    assert layer.merged and list(layer.state_dict()) == keys
    assert torch.equal(layer(x), F.linear(x, again, layer.bias))
    assert sum(b.nbytes for b in layer.merged_quantized.buffers()) == sum(part.nbytes for part in stored)
    layer.half()
    assert torch.equal(layer.merged_quantized.stored().dense(BF16), again)
    layer.unmerge()
    assert not layer.merged and all_equal(parts(layer), stored)


def test_loading_unmerges(device):
    layer = make_layer("nf4", device)
    layer.merge(requantize=True)
    layer.load_state_dict(layer.state_dict())
    assert not layer.merged


def test_requantizing_a_dense_layer_is_refused(device):
    layer = FusedBoraLinear.from_linear(dense_linear(torch.randn(8, 8, device=device)))
    with pytest.raises(ValueError, match="requantize must be False over a dense weight of torch.float32, got True"):
        layer.merge(requantize=True)
    assert not layer.merged


# ---- what cannot be read ----


def before_quantization(device):
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear4bit(64, 32)


def sharded(device):
    linear = quantized_linear("nf4", torch.randn(32, 64, device=device))
    linear.weight.data = linear.weight.data[:512]
    return linear


def cast(device):
    linear = quantized_linear("nf4", torch.randn(32, 64, device=device), quant_storage=BF16)
    linear.weight.data = linear.weight.data.half()
    return linear


def other_shape(device):
    linear = quantized_linear("nf4", torch.randn(32, 64, device=device))
    linear.out_features = 31
    return linear


def other_code(device):
    linear = quantized_linear("nf4", torch.randn(32, 64, device=device))
    linear.quant_state.quant_type = "af4"
    return linear


def repacked_for_the_cpu(device):
    linear = quantized_linear("nf4", torch.randn(32, 64, device=device))
    linear.quant_state.packing_format_for_cpu = True
    return linear


def int8_in_float16(device):
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True)


def int8_without_scales(device):
    linear = quantized_linear("int8", torch.randn(32, 64, device=device))
    linear.weight.SCB = None
    return linear


def quantized_activations(device):
    quantization = pytest.importorskip("torchao.quantization")
    linear = dense_linear(torch.randn(32, 64, device=device).to(BF16))
    quantization.quantize_(linear, quantization.Int8DynamicActivationInt8WeightConfig())
    return linear


UNREADABLE = {
    before_quantization: (ValueError, "must be quantized, got a Linear4bit before its move to a device"),
    sharded: (ValueError, r"must hold 1024 bytes for \[32, 64\], got 512 \(sharded\)"),
    cast: (TypeError, "must be stored as torch.bfloat16, got torch.float16"),
    other_shape: (ValueError, r"must be \[31, 64\], got \[32, 64\]"),
    other_code: (ValueError, "must be of quant_type nf4 or fp4, got 'af4'"),
    repacked_for_the_cpu: (
        ValueError,
        "must be in bitsandbytes' storage format, got the one that Linear4bit converts to",
    ),
    int8_in_float16: (ValueError, "must be int8, got torch.float32"),
    int8_without_scales: (ValueError, "must come with its scales, got None"),
    quantized_activations: (ValueError, "must be weight-only quantized, got Int8Tensor with act_quant_kwargs"),
}


@pytest.mark.parametrize("make", UNREADABLE, ids=lambda make: make.__name__)
def test_unreadable_weights_are_refused(make, device):
    linear = make(device)
    kind, message = UNREADABLE[make]
    with pytest.raises(kind, match=f"linear.weight {message}"):
        FusedBoraLinear.from_linear(linear)


def test_arguments_over_a_quantized_weight_are_checked(device):
    layer = make_layer("nf4", device)
    with pytest.raises(ValueError, match=r"x must be \[..., 128\] for weight \[64, 128\], got \[3, 64\]"):
        layer(torch.randn(3, 64, device=device, dtype=BF16))
    with pytest.raises(ValueError, match=r"lora_B must be \[64, 4\], got \[63, 4\]"):
        bora_linear(tokens(device), layer.weight.stored(), layer.lora_A, layer.lora_B[:63], None, None, scaling=SCALING)


def test_dense_and_unknown_weights_are_none_to_read(device):
    assert quantized.read(nn.Linear(4, 4, device=device)) is None


# ---- on a GPU ----


@pytest.mark.gpu
@four_bit
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
