"""Convolutions whose weight is made by a word on the device: what is kept for backward, and kinds of derivatives."""

import copy

import pytest
import torch
from conftest import CUDA
from helpers.accuracy import assert_equal
from helpers.cases import conventions
from helpers.convolutions import (
    WAYS,
    act_by_word,
    cancelled_factors,
    check,
    dense_of,
    double,
    layer_of,
    make,
    require_kernel,
    run,
)
from torch.utils.checkpoint import checkpoint


@pytest.fixture(params=WAYS)
def word(request, monkeypatch):
    act_by_word(request.param, monkeypatch)
    return request.param


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_no_weight_is_kept_for_backward(word, channels_last, device):
    require_kernel(word, torch.float32)
    conv, x, dy = make("2d", torch.float32, device)
    if channels_last:
        conv, x = (t.to(memory_format=torch.channels_last) for t in (conv, x))
    factors = [t.requires_grad_() for t in cancelled_factors(conv, ("row",), 1e-3, rank=3)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer_of(conv)(x.requires_grad_(), *factors)
    kept = {t.untyped_storage().data_ptr() for t in saved if t.numel() == conv.weight.numel()}
    assert kept == {conv.weight.untyped_storage().data_ptr()}
    y.backward(dy)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing(word, use_reentrant, device):
    require_kernel(word, torch.bfloat16)
    conv, x, dy = make("1d-circular", torch.bfloat16, device)
    factors = cancelled_factors(conv, ("row", "col"), 1e-2, rank=8)
    expected = run(layer_of(conv), x, *factors, dy=dy)
    leaves = [t.detach().clone().requires_grad_() for t in (x, *factors)]
    y = checkpoint(layer_of(conv), *leaves, use_reentrant=use_reentrant)
    y.backward(dy)
    assert_equal([y.detach(), *(t.grad for t in leaves)], expected.values())


@conventions
@pytest.mark.parametrize("differentiated", ["x", "lora_A", "lora_B", "x beside a loss"])
def test_second_derivatives_are_those_of_the_layer(word, differentiated, detach_norm, device):
    """Of a penalty on a gradient; those of two products that are added as they are, in float32."""
    require_kernel(word, torch.float32)
    if not detach_norm and differentiated.startswith("lora"):
        pytest.skip("an exact gradient of a factor has no second derivative")
    conv, x, dy = make("1d", torch.float32, device)
    factors = cancelled_factors(conv, ("row",), 0.02, rank=4)
    place = ("x", "lora_A", "lora_B").index(differentiated.split()[0])

    def penalized(layer, *leaves):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        y = layer(*leaves)
        (gradient,) = torch.autograd.grad(y, leaves[place], dy.to(y.dtype), create_graph=True)
        loss = gradient.square().sum() / 100
        if "loss" in differentiated:
            loss = loss + y.square().sum()
        return torch.autograd.grad(loss, leaves[:place] + leaves[place + 1 :])

    exact = penalized(dense_of(copy.deepcopy(conv).double(), detach_norm=detach_norm), *double(x, *factors))
    for actual, true in zip(penalized(layer_of(conv, detach_norm=detach_norm), x, *factors), exact, strict=True):
        assert (actual.double() - true).norm() < 1e-4 * true.norm()


@pytest.mark.plain_empty
def test_compiled_to_one_graph(word, device):
    if word == "kernel" and not CUDA:
        pytest.skip("only a GPU's operator is traced")
    torch._dynamo.reset()
    torch._dynamo.trace_rules.clear_lru_cache()  # which may know torch.empty as other tests have it
    conv, x, dy = make("2d", torch.bfloat16, device)
    factors = cancelled_factors(conv, ("row", "col"), 1e-2, rank=9)
    compiled = torch.compile(layer_of(conv), backend="aot_eager", fullgraph=True)
    check(conv, x, factors, dy, layer=lambda conv, **options: compiled)
