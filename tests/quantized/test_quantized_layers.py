"""Layers over quantized weights: copies, files, merging, and what cannot be read."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import SCALING, orders
from helpers.quantized_layers import (
    BF16,
    all_equal,
    dense_linear,
    kinds,
    make_layer,
    parts,
    quantized_linear,
    results,
    tokens,
)
from torch import nn

from bora_kernels import FusedBoraLinear, bora_linear, quantized
from bora_kernels.reference import bora_weight_ref

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
        assert twin.weight.stored().tensors[0].data_ptr() != layer.weight.stored().tensors[0].data_ptr()


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
