"""BoRA over quantized linear layers through PEFT."""

import copy

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.cases import orders
from helpers.peft_models import bora_layers, make_peft
from helpers.quantized_layers import kinds, quantized_linear
from torch import nn

peft = pytest.importorskip("peft")
from peft import PeftModel  # noqa: E402

from bora_kernels import reuse_scales  # noqa: E402
from bora_kernels.integrations.peft import BoraQuantizedLinear  # noqa: E402
from bora_kernels.ops import operators  # noqa: E402
from bora_kernels.quantized import read  # noqa: E402
from bora_kernels.reference import bora_linear_ref  # noqa: E402

N, K = 64, 128


def make_base(kind, dtype=torch.float32):
    torch.manual_seed(0)
    weight, bias = torch.randn(N, K).to(dtype) / K**0.5, torch.randn(N).to(dtype)
    options = {"compute_dtype": dtype} if kind[:3] in ("nf4", "fp4") else {}
    # in training mode, because eval mode lets bitsandbytes repack 4-bit weights on a CPU
    return nn.ModuleDict({"layer": quantized_linear(kind, weight, bias, **options), "norm": nn.LayerNorm(N)})


def adapt(base, **options):
    model = make_peft(base, target_modules=["layer"], **options)
    layer = model.base_model.model["layer"]
    assert type(layer) is BoraQuantizedLinear
    return model, layer


def parts(layer):
    return [part.clone() for part in read(layer._quantized()).tensors]


@kinds
@orders
@pytest.mark.parametrize("use_dora", [False, True], ids=["bora", "dora"])
def test_a_quantized_layer_is_the_reference_on_its_dequantized_weight(kind, order, use_dora):
    model, layer = adapt(make_base(kind), norm_order=order, use_dora=use_dora)
    W0, bias = read(layer.base_layer).dense(torch.float32), layer.base_layer.bias
    x, dy = torch.randn(9, K), torch.randn(9, N)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    y = layer(x)
    gradients = torch.autograd.grad(y, [layer.get_parameter(name) for name in names], dy)

    def reference(dtype):
        leaves = [layer.get_parameter(name).detach().to(dtype).requires_grad_() for name in names]
        col = leaves[3] if len(leaves) == 4 else None
        expected = bora_linear_ref(
            x.to(dtype), W0.to(dtype), *leaves[:3], col, bias.to(dtype), scaling=layer.scaling["default"],
            norm_order=order, detach_norm=use_dora,
        )  # fmt: skip
        return {
            "y": expected.detach(),
            **dict(zip(names, torch.autograd.grad(expected, leaves, dy.to(dtype)), strict=True)),
        }

    actual = {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
    assert_accurate(actual, reference(torch.float32), reference(torch.float64), samples=36)


@kinds
def test_a_new_adapter_changes_nothing(kind):
    base = make_base(kind)
    W0 = read(base["layer"]).dense(torch.float32)
    _, layer = adapt(base, trained=False)
    x = torch.randn(5, K)
    expected = nn.functional.linear(x, W0, layer.base_layer.bias.float())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    row = layer.lora_magnitude_vector_row["default"].weight
    assert row.dtype == torch.float32
    torch.testing.assert_close(row, W0.norm(dim=1), rtol=1e-5, atol=0)


@kinds
def test_micro_batches_in_a_scope_share_scales(kind, monkeypatch):
    """What is read of the quantized layer anew in every call has the same state."""
    _, layer = adapt(make_base(kind))
    x, computed, forward = torch.randn(5, K), [], operators.forward
    expected = layer(x)

    def noting(*arguments, **options):
        if arguments[3] is None:  # scales
            computed.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(operators, "forward", noting)
    with reuse_scales():
        assert all(torch.equal(layer(x), expected) for _ in range(3))
    assert len(computed) == 1


@kinds
def test_merging_is_dense_and_gives_the_quantized_layer_back(kind):
    model, layer = adapt(make_base(kind))
    x, before = torch.randn(5, K), parts(layer)
    expected = layer(x)
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        assert type(layer.base_layer) is nn.Linear and not layer.base_layer.weight.requires_grad
        half = layer.base_layer.weight.dtype != torch.float32
        torch.testing.assert_close(layer(x), expected, rtol=5e-3 if half else 1e-4, atol=2e-2 if half else 1e-4)
        model.unmerge_adapter()
    assert all(torch.equal(part, kept) for part, kept in zip(parts(layer), before, strict=True))
    assert torch.equal(layer(x), expected)
    plain = model.merge_and_unload()
    assert type(plain["layer"]) is nn.Linear and "quantized" not in "".join(plain.state_dict())


@kinds
def test_adapters_over_a_quantized_base_are_saved_and_loaded(kind, tmp_path):
    base = make_base(kind)
    model, layer = adapt(copy.deepcopy(base))
    x = torch.randn(5, K)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded.base_model.model["layer"](x), layer(x))
    assert len(peft.get_peft_model_state_dict(model)) == 4


@kinds
def test_a_bfloat16_layer_trains(kind):
    model, layer = adapt(make_base(kind, torch.bfloat16), trained=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(16, K).bfloat16(), torch.randn(16, N)
    losses = []
    for _ in range(10):
        y = layer(x)
        losses.append((y.float() - target).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert y.dtype == torch.bfloat16 and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initializations_that_change_the_weight_are_refused(init):
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' would quantize its weight again"):
        adapt(make_base("nf4"), init_lora_weights=init)


def test_an_unfit_quantized_layer_is_refused_with_the_reason():
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.ModuleDict({"layer": bnb.nn.Linear8bitLt(K, N, has_fp16_weights=True)})
    with pytest.raises(ValueError, match="Target module layer .* is not supported: linear.weight must be int8"):
        make_peft(base, target_modules=["layer"])
    assert not bora_layers(base)


@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int8", "torchao-float8"])
def test_a_quantized_layer_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    _, layer = adapt(make_base(kind))
    x = torch.randn(4, K)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad])))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
