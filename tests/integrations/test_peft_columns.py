"""PEFT's layers and this package's give one W', to the bit, for every member of the family; columns alone in PEFT."""

import copy

import pytest
import torch
from helpers.cases import HALVES, NAMES, orders
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("bora_kernels.integrations.peft")

from bora_kernels import FusedBoraLinear, FusedColumnLinear, FusedDoraLinear  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402
from bora_kernels.reference import bora_weight_ref  # noqa: E402

N, K, R = 96, 40, 3
CLASSES = {"bora": (FusedBoraLinear, {}), "dora": (FusedDoraLinear, {"use_dora": True})}
CLASSES["columns"] = (FusedColumnLinear, {"columns_only": True})
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=NAMES.get)
members = pytest.mark.parametrize("member", CLASSES)


def peft_layer(base, order, options):
    model = nn.Sequential(base)
    config = BoraConfig(r=R, lora_alpha=6, target_modules=["0"], norm_order=order, **options)
    return peft.get_peft_model(model, config).base_model.model[0]


def tensors_of(layer):
    """The trained tensors of PEFT's layer by the names that this package gives them."""
    _, A, B = layer._matrices("default")
    magnitudes = zip(("magnitude_row", "magnitude_col"), layer._magnitudes("default"), strict=True)
    return {"lora_A": A, "lora_B": B, **{name: t for name, t in magnitudes if t is not None}}


def trained(base, member, order):
    """The layer of this package and that of PEFT with the same trained tensors."""
    cls, options = CLASSES[member]
    own = cls.from_linear(copy.deepcopy(base), r=R, alpha=6, norm_order=order)
    theirs = peft_layer(base, order, options)
    with torch.no_grad():
        for name in ("lora_A", "lora_B", "magnitude_row", "magnitude_col"):
            parameter = getattr(own, name)
            if parameter is None:
                continue
            start = parameter.clone()
            parameter.add_(0.1 * torch.randn_like(parameter) * (start.abs().mean() + 0.3))
            other = tensors_of(theirs)[name]
            if name.startswith("magnitude"):
                assert torch.equal(start, other), f"{name} starts as something else"
            other.copy_(parameter)
    return own, theirs


@members
@orders
@dtypes
def test_a_linear_layer_merges_to_the_same_bits(member, order, dtype):
    own, theirs = trained(nn.Linear(K, N).to(dtype), member, order)
    expected = own.effective_weight()
    assert torch.equal(theirs.effective_weight("default"), expected)
    theirs.merge()
    assert torch.equal(theirs.base_layer.weight, expected)
    x = torch.randn(5, K).to(dtype)
    own.merge()
    assert torch.equal(theirs(x), own(x))


@members
@orders
@dtypes
def test_an_embedding_and_a_pointwise_convolution_merge_to_the_same_bits(member, order, dtype):
    """The same matrix as the weight of three kinds of layers: one W'."""
    linear = nn.Linear(K, N, bias=False).to(dtype)
    embedding, conv = nn.Embedding(K, N, dtype=dtype), nn.Conv1d(K, N, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        embedding.weight.copy_(linear.weight.T)
        conv.weight.copy_(linear.weight[..., None])
    own, _ = trained(linear, member, order)
    for base in (embedding, conv):
        layer = peft_layer(base, order, CLASSES[member][1])
        with torch.no_grad():
            for name, tensor in tensors_of(layer).items():
                value = getattr(own, name)
                tensor.copy_(value.view_as(tensor))
        merged = layer.effective_weight("default")
        merged = merged.T if isinstance(base, nn.Embedding) else merged[..., 0]
        assert torch.equal(merged, own.effective_weight())


@orders
def test_columns_alone_train_as_the_reference(order):
    """Gradients through PEFT's layer are those of the dense formula without a row magnitude; the order has no say."""
    _, layer = trained(nn.Linear(K, N), "columns", order)
    tensors = tensors_of(layer)
    assert tensors.keys() == {"lora_A", "lora_B", "magnitude_col"}
    x, dy = torch.randn(7, K), torch.randn(7, N)
    layer(x).backward(dy)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    weight = bora_weight_ref(layer.base_layer.weight.detach().double(), magnitude_row=None, **exact, scaling=2.0)
    (x.double() @ weight.T).backward(dy.double())
    for name, t in tensors.items():
        torch.testing.assert_close(t.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_columns_alone_is_saved_and_loaded(tmp_path):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(K, N))
    model = peft.get_peft_model(copy.deepcopy(base), BoraConfig(r=R, target_modules=["0"], columns_only=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(4, K)
    assert loaded.peft_config["default"].columns_only and torch.equal(loaded(x), model(x))


def test_columns_only_and_dora_exclude_each_other():
    with pytest.raises(ValueError, match="columns_only must be False with use_dora"):
        BoraConfig(columns_only=True, use_dora=True)
    with pytest.raises(ValueError, match="columns_only must be True or False, got 1"):
        BoraConfig(columns_only=1)
