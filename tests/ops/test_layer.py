"""Both fused backends against the reference: the output and every gradient, by the accuracy rule."""

from itertools import chain, combinations

import pytest
import torch
from helpers.cases import (
    HALVES,
    SCALING,
    TRAINED,
    Case,
    backends,
    check_layer,
    conventions,
    dtypes,
    orders,
    require,
    run,
    variants,
)

from bora_kernels import bora_linear

pytestmark = pytest.mark.sampled(4)
BF16, FP16 = HALVES
SMALL = {"M": 9, "N": 37, "K": 53, "R": 3}


def cases(*values):
    return pytest.mark.parametrize("case", values, ids=str)


# ---- members, orders, conventions, dtypes ----


@backends
@variants
@conventions
@dtypes
def test_matches_reference(backend, member, order, detach_norm, dtype, device):
    case = Case(dtype=dtype, member=member, order=order)
    check_layer(backend, case.inputs(device), case.upstream(device), norm_order=order, detach_norm=detach_norm)


@variants
@conventions
def test_torch_backend_in_float64(member, order, detach_norm, device):
    case = Case(300, 65, 70, dtype=torch.float64, member=member, order=order)
    check_layer("torch", case.inputs(device), case.upstream(device), norm_order=order, detach_norm=detach_norm)


@backends
@cases(
    *(Case(**SMALL, dtype=dtype, adapter_dtype=dtype) for dtype in HALVES),
    Case(**SMALL, dtype=BF16, adapter_dtype=BF16, order="col_row"),
    *(Case(**SMALL, dtype=dtype, bias=False) for dtype in (torch.float32, *HALVES)),
)
def test_adapter_dtype_and_no_bias(backend, case, device):
    check_layer(backend, case.inputs(device), case.upstream(device), norm_order=case.order)


# ---- sizes ----

SIZES = [
    Case(0, 37, 53, 3),
    Case(0, 40, 48, 3),
    Case(1, 37, 53, 3, dtype=BF16),
    Case(1, 64, 64, 16, dtype=FP16, order="col_row"),
    Case(17, 67, 61, 1, dtype=BF16, order="col_row"),
    Case(65, 130, 129, 16, dtype=FP16),
    Case(17, 64, 64, 65, dtype=BF16),
    Case(5, 30, 28, 130, dtype=BF16, order="col_row"),
    Case(3, 16, 24, 512, dtype=FP16, member="lora"),
    Case(300, 40, 48, 3),  # many blocks of tokens, and several splits of them
    Case(9, 300, 40, 3),  # several splits of the first axis
    Case(9, 40, 300, 3, order="col_row"),
    Case(3, 16, 2049, 2, dtype=BF16),  # projections split over columns, of x and of dy
    Case(3, 2050, 16, 2, dtype=FP16, order="col_row"),
]


@backends
@cases(*SIZES)
def test_sizes(backend, case, device):
    check_layer(backend, case.inputs(device), case.upstream(device), norm_order=case.order)


@cases(*(Case(9, 40, 48, 512, dtype=dtype) for dtype in (torch.float32, torch.float64)))
def test_rank_512_in_torch(case, device):
    check_layer("torch", case.inputs(device), case.upstream(device))


@backends
@pytest.mark.parametrize("member", ["bora", "lora"])
def test_empty_batch(backend, member, device):
    case = Case(0, 40, 48, 3, dtype=FP16, member=member)
    results = check_layer(backend, case.inputs(device), case.upstream(device))
    for name, gradient in results.items():
        assert not gradient.any(), f"{name} of an empty batch is not zero"


# ---- layouts ----


def strided(tensor):
    """The same values with gaps between the elements of the last dimension."""
    wide = torch.full((*tensor.shape, 3), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1] = tensor
    return wide[..., 1]


def transposed(tensor):
    """The same values stored with the last two dimensions swapped."""
    return tensor.mT.contiguous().mT


def offset(tensor):
    """The same values as rows of a wider matrix, from an odd column on: no alignment of 16 bytes."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 8), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[:, 3:-5] = tensor
    return wide[:, 3:-5]


LAYOUTS = {
    "x-strided": ("x", strided),
    "x-transposed": ("x", transposed),
    "x-offset": ("x", offset),
    "weight-transposed": ("weight", transposed),
    "weight-strided": ("weight", strided),
    "weight-offset": ("weight", offset),
    "lora_A-transposed": ("lora_A", transposed),
    "lora_B-strided": ("lora_B", strided),
    "magnitude_row-strided": ("magnitude_row", strided),
    "magnitude_col-strided": ("magnitude_col", strided),
    "bias-strided": ("bias", strided),
    "dy-strided": ("dy", strided),
    "dy-transposed": ("dy", transposed),
}


@backends
@orders
@pytest.mark.parametrize("name, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(backend, order, name, layout, device):
    case = Case(9, 40, 56, 3, dtype=BF16)
    tensors = case.inputs(device) | {"dy": case.upstream(device)}
    tensors[name] = layout(tensors[name])
    assert not tensors[name].is_contiguous()
    dy = tensors.pop("dy")
    check_layer(backend, tensors, dy, norm_order=order)


@backends
@pytest.mark.parametrize("member", ["bora", "lora"])
def test_expanded_input_and_sum_upstream(backend, member, device):
    """Stride 0 in x, in dy (as .sum() makes it) and in every factor."""
    case = Case(**SMALL, member=member)
    inputs = case.inputs(device)
    inputs["x"] = inputs["x"][:1].expand(9, 53)
    inputs["lora_A"] = inputs["lora_A"][:1].expand(3, 53)
    inputs["lora_B"] = inputs["lora_B"][:, :1].expand(37, 3)
    check_layer(backend, inputs, torch.ones((), device=device).expand(9, 37))


@backends
@pytest.mark.parametrize("shape", [(53,), (9, 53), (3, 2, 53), (2, 1, 3, 53), (2, 0, 53)], ids=str)
def test_leading_dimensions(backend, shape, device):
    case = Case(**SMALL)
    inputs = case.inputs(device)
    x = torch.randn(shape, device=device)
    dy = torch.randn(*shape[:-1], 37, device=device)
    results = check_layer(backend, inputs | {"x": x}, dy)
    assert results["y"].shape == dy.shape and results["d_x"].shape == x.shape


@backends
def test_permuted_batch(backend, device):
    case = Case(**SMALL)
    x = torch.randn(5, 3, 53, device=device).transpose(0, 1)
    dy = torch.randn(5, 3, 37, device=device).transpose(0, 1)
    check_layer(backend, case.inputs(device) | {"x": x}, dy)


# ---- frozen parameters ----

SUBSETS = list(chain.from_iterable(combinations(TRAINED, n) for n in range(len(TRAINED))))


@backends
@orders
@conventions
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
def test_every_subset_of_frozen_parameters(backend, order, detach_norm, bias, device):
    """Only what is asked for is made, and it is the same as when everything is asked for."""
    case = Case(5, 20, 24, 2, bias=bias)
    inputs, dy = case.inputs(device), case.upstream(device)
    options = {"norm_order": order, "detach_norm": detach_norm, "scaling": SCALING, "backend": backend}
    subsets = [subset for subset in SUBSETS if bias or "bias" not in subset]
    if backend == "triton":  # the interpreter is slow: each subset in one of the settings
        subsets = subsets[4 * bias + 2 * (order == "row_col") + detach_norm :: 8]
        require(backend, torch.float32)
    whole = run(bora_linear, inputs, dy, **options)
    for subset in subsets:
        part = run(bora_linear, inputs, dy, trained=subset, **options)
        assert list(part) == ["y", *(f"d_{name}" for name in subset)]
        for name, value in part.items():
            assert torch.equal(value, whole[name]), (subset, name)


@backends
@variants
def test_frozen_parameters_get_no_gradient(backend, member, order, device):
    require(backend, torch.float32)
    inputs = Case(5, 20, 24, 2, member=member).inputs(device)
    y = bora_linear(**inputs, scaling=SCALING, norm_order=order, backend=backend)
    assert not y.requires_grad
    inputs["lora_B"].requires_grad_()
    bora_linear(**inputs, scaling=SCALING, norm_order=order, backend=backend).sum().backward()
    assert [name for name, t in inputs.items() if t is not None and t.grad is not None] == ["lora_B"]
    with torch.no_grad():
        assert not bora_linear(**inputs, scaling=SCALING, norm_order=order, backend=backend).requires_grad
