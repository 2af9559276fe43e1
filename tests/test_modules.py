"""FusedBoraLinear and FusedDoraLinear as modules: construction, merging, copies, files, devices."""

import copy
import io
import pickle

import pytest
import torch
from helpers.accuracy import assert_accurate, assert_equal
from helpers.cases import backends, orders, require
from torch import nn

from bora_kernels import FusedBoraLinear, FusedDoraLinear, reference

N, K, R = 40, 48, 4
classes = pytest.mark.parametrize("cls", [FusedBoraLinear, FusedDoraLinear])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make_linear(device, dtype=torch.float32, bias=True):
    return nn.Linear(K, N, bias=bias, device=device, dtype=dtype)


def train_a_little(module):
    """Moves every trained parameter off its start."""
    with torch.no_grad():
        module.lora_B.normal_()
        for magnitude in (module.magnitude_row, module.magnitude_col):
            if magnitude is not None:
                magnitude *= 1 + 0.1 * torch.randn_like(magnitude)
    return module


def trained_module(cls, device, dtype=torch.float32, **options):
    return train_a_little(cls.from_linear(make_linear(device, dtype), r=R, **options))


def effective_weight_ref(module, dtype=torch.float64):
    tensors = (module.weight, module.lora_A, module.lora_B, module.magnitude_row, module.magnitude_col)
    wide = [None if t is None else t.detach().to(dtype) for t in tensors]
    return reference.bora_weight_ref(*wide, scaling=module.scaling, norm_order=module.norm_order)


# ---- construction ----


@classes
@dtypes
def test_from_linear_shares_and_freezes(cls, dtype, device):
    linear = make_linear(device, dtype)
    pointers = linear.weight.data_ptr(), linear.bias.data_ptr()
    module = cls.from_linear(linear.eval(), r=R)
    assert module.weight is linear.weight and module.bias is linear.bias
    assert (module.weight.data_ptr(), module.bias.data_ptr()) == pointers
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    magnitudes = {"magnitude_row", "magnitude_col"} if cls is FusedBoraLinear else {"magnitude_row"}
    assert trained.keys() == {"lora_A", "lora_B"} | magnitudes
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.device for p in trained.values()} == {linear.weight.device}
    assert not module.training and (module.in_features, module.out_features) == (K, N)


@classes
@orders
@backends
@dtypes
def test_starts_as_the_frozen_layer(cls, order, backend, dtype, device):
    require(backend, dtype)
    linear = make_linear(device, dtype)
    module = cls.from_linear(linear, r=R, norm_order=order)
    module.backend = backend
    x = torch.randn(7, K, device=device).to(dtype)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    assert_accurate({"y": module(x)}, {"y": linear(x)}, {"y": exact}, samples=min(N, K, 7 * R))


def test_initial_parameters(device):
    module = FusedBoraLinear(4096, 64, r=16, device=device, dtype=torch.bfloat16)
    bound = 4096**-0.5  # Kaiming-uniform with a = √5, as in LoRA
    assert module.lora_A.abs().max() <= bound
    assert abs(module.lora_A.std().item() / bound - 3**-0.5) < 5e-3
    assert not module.lora_B.any()
    wide = module.weight.double()
    for magnitude, dim in ((module.magnitude_row, 1), (module.magnitude_col, 0)):
        torch.testing.assert_close(magnitude.double(), wide.norm(dim=dim), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rslora, scaling", [(False, 8 / 16), (True, 8 / 4)], ids=["lora", "rslora"])
def test_scaling(rslora, scaling):
    module = FusedBoraLinear(K, N, r=16, alpha=8, rslora=rslora)
    assert module.scaling == scaling
    train_a_little(module)
    x = torch.randn(3, K)
    torch.testing.assert_close(module(x), nn.functional.linear(x, effective_weight_ref(module).float(), module.bias))


def test_options_reach_the_layer(device):
    module = trained_module(FusedBoraLinear, device, norm_order="col_row", detach_norm=True, dropout=0.5)
    x = torch.randn(5, K, device=device)
    assert not torch.equal(module(x), module(x))  # dropout
    module.eval()
    tensors = {name: getattr(module, name).detach().requires_grad_() for name in ("lora_A", "magnitude_row")}
    frozen = (module.lora_B.detach(), tensors["magnitude_row"], module.magnitude_col.detach(), module.bias)
    y = reference.bora_linear_ref(
        x,
        module.weight,
        tensors["lora_A"],
        *frozen,
        scaling=module.scaling,
        norm_order="col_row",
        detach_norm=True,
    )
    y.sum().backward()
    module(x).sum().backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(getattr(module, name).grad, tensor.grad, rtol=1e-4, atol=1e-5)


def test_extra_repr():
    assert repr(FusedBoraLinear(3, 5, r=2)) == (
        "FusedBoraLinear(in_features=3, out_features=5, r=2, alpha=32, bias=True, norm_order='row_col')"
    )
    module = FusedDoraLinear(3, 5, r=2, alpha=4, bias=False, dropout=0.1, norm_order="col_row", detach_norm=True)
    module.merge()
    assert repr(module) == (
        "FusedDoraLinear(in_features=3, out_features=5, r=2, alpha=4, bias=False, norm_order='col_row', "
        "dropout=0.1, detach_norm=True, merged=True)"
    )


# ---- merging ----


@classes
@orders
@dtypes
def test_effective_weight_is_rounded_once(cls, order, dtype, device):
    """Half precision to within a unit in the last place of float64's, and what float32 sums err; float32 by the
    accuracy rule."""
    module = trained_module(cls, device, dtype, norm_order=order)
    merged, exact = module.effective_weight(), effective_weight_ref(module)
    assert merged.dtype == dtype and not merged.requires_grad
    assert torch.equal(merged, module.effective_weight())
    if dtype == torch.float32:
        plain = effective_weight_ref(module, torch.float32)
        assert_accurate({"weight": merged}, {"weight": plain}, {"weight": exact}, samples=N * K)
    else:
        info = torch.finfo(dtype)
        ulp = info.eps * torch.exp2(torch.floor(torch.log2(exact.abs()))).clamp_min(info.tiny)
        error_of_sums = 1e-6 * exact.abs().max()  # where the terms of V cancel
        error = merged.double() - exact
        assert (error.abs() <= ulp + error_of_sums).all()
        assert (error / ulp).mean().abs() < 0.1  # at random it would have a standard deviation of 0.41 / √(N·K)


@orders
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(12, 16384), (16384, 12), (300, 200)], ids=str)
def test_effective_weight_of_an_untrained_layer_is_the_weight(shape, dtype, order, device):
    """To the bit, although norms that are summed in another order make the scales 1 only to within float32's errors."""
    weight = nn.Parameter(torch.randn(shape, device=device).to(dtype))
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    linear.weight = weight
    module = FusedBoraLinear.from_linear(linear, r=2, norm_order=order)
    with torch.no_grad():
        module.magnitude_row.copy_(weight.double().norm(dim=1))
        module.magnitude_col.copy_(weight.double().norm(dim=0))
    assert torch.equal(module.effective_weight(), weight)


@backends
@dtypes
def test_merged_output(backend, dtype, device):
    require(backend, dtype)
    module = trained_module(FusedBoraLinear, device, dtype)
    module.backend = backend
    x = torch.randn(7, K, device=device).to(dtype)
    adapted = module(x)
    module.merge()
    assert module.merged
    exact = nn.functional.linear(x.double(), effective_weight_ref(module), module.bias.double())
    plain = nn.functional.linear(x, effective_weight_ref(module).to(dtype), module.bias)
    outputs = {"adapted": adapted, "merged": module(x), "to_linear": module.to_linear()(x)}
    assert_accurate(outputs, dict.fromkeys(outputs, plain), dict.fromkeys(outputs, exact), samples=7 * R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_merges_leave_the_weight_alone(dtype, device):
    module = trained_module(FusedBoraLinear, device, dtype)
    weight, before = module.weight, module.weight.clone()
    x = torch.randn(3, K, device=device).to(dtype)
    y = module(x)
    for _ in range(1000):
        module.merge()
        module.unmerge()
    assert module.weight is weight and torch.equal(weight, before) and not module.merged
    assert torch.equal(module(x), y)


def test_to_linear_is_plain_and_frozen(device):
    module = trained_module(FusedBoraLinear, device, torch.bfloat16).eval()
    linear = module.to_linear()
    assert type(linear) is nn.Linear and not linear.training
    assert not any(p.requires_grad for p in linear.parameters())
    assert torch.equal(linear.weight, module.effective_weight()) and torch.equal(linear.bias, module.bias)
    linear.bias.add_(1)
    assert not torch.equal(linear.bias, module.bias), "the bias is shared"


def test_state_dict_while_merged_holds_the_base_and_loads(device):
    module = trained_module(FusedBoraLinear, device)
    unmerged = copy.deepcopy(module.state_dict())
    module.merge()
    merged = module.state_dict()
    assert merged.keys() == unmerged.keys()
    assert_equal(merged, unmerged)

    other = FusedBoraLinear(K, N, r=R, device=device)
    other.merge()
    other.load_state_dict(merged)
    x = torch.randn(3, K, device=device)
    assert not other.merged, "it would run on the weights of before"
    module.unmerge()
    assert torch.equal(other(x), module(x))


# ---- copies, files, devices ----


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "torch.save"])
@classes
def test_copies(cls, way, merged, device):
    module = trained_module(cls, device, torch.bfloat16, norm_order="col_row")
    x = torch.randn(3, K, device=device).bfloat16()
    if merged:
        module.merge()
    y = module(x)
    if way == "deepcopy":
        twin = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        state = module.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        twin = cls(K, N, r=R, norm_order="col_row", device=device, dtype=torch.bfloat16)
        twin.load_state_dict(state)
        if merged:
            twin.merge()
    assert torch.equal(twin(x), y) and twin.merged == merged
    with torch.no_grad():
        twin.lora_A.zero_()
        twin.weight.zero_()
    assert torch.equal(module(x), y), "the copy shares memory"


def test_to_dtype(device):
    module = trained_module(FusedBoraLinear, device)
    x = torch.randn(3, K, device=device)
    y = module(x)
    module.to(torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(module(x.bfloat16()).float(), y, rtol=0.05, atol=0.05)
    module.to(torch.float64).merge()
    module.to(torch.float32)
    assert module(x).dtype == torch.float32  # the merged weight goes along


def test_meta_device_then_load(device):
    source = trained_module(FusedBoraLinear, device)
    module = FusedBoraLinear(K, N, r=R, device="meta")
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device=device)
    module.load_state_dict({"weight": source.weight, "bias": source.bias}, strict=False)
    module.reset_parameters()
    x = torch.randn(3, K, device=device)
    torch.testing.assert_close(module(x), nn.functional.linear(x, source.weight, source.bias))
    module.load_state_dict(source.state_dict())
    assert torch.equal(module(x), source(x))


def test_parameters_that_are_not_where_a_module_keeps_them(device):
    """A parametrized factor is a property, and a sharding engine may keep a plain attribute: both are read."""
    layer = trained_module(FusedBoraLinear, device)
    x, moved = torch.randn(3, K, device=device), copy.deepcopy(layer)
    with torch.no_grad():
        lora_A = moved.lora_A.tanh()
        del moved.lora_A
        moved.lora_A = lora_A
        nn.utils.parametrize.register_parametrization(layer, "lora_A", nn.Tanh())
        assert_equal(moved(x), layer(x))
