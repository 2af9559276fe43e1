"""Values that real models send and careless layers break on: zeros, huge biases, infinities; and dropout."""

import pytest
import torch
from helpers.accuracy import assert_same_finite
from helpers.cases import (
    NAMES,
    SCALING,
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
from bora_kernels.reference import bora_linear_ref

pytestmark = pytest.mark.sampled(6)
BF16 = torch.bfloat16
SMALL = {"M": 9, "N": 37, "K": 53, "R": 3}


@backends
@variants
@conventions
def test_zero_lora_B(backend, member, order, detach_norm, device):
    case = Case(**SMALL, dtype=BF16, member=member)
    inputs = case.inputs(device)
    inputs["lora_B"].zero_()
    results = check_layer(backend, inputs, case.upstream(device), norm_order=order, detach_norm=detach_norm)
    assert not results["d_lora_A"].any() and results["d_lora_B"].any()


@backends
@orders
@conventions
@dtypes
def test_zero_magnitudes(backend, order, detach_norm, dtype, device):
    """The output is 0 there, and the magnitude's gradient is not."""
    case = Case(**SMALL, dtype=dtype, bias=False)
    inputs = case.inputs(device)
    inputs["magnitude_row"][:4] = 0.0
    inputs["magnitude_col"][5:7] = 0.0
    inputs["magnitude_col"][6] = -0.0
    results = check_layer(backend, inputs, case.upstream(device), norm_order=order, detach_norm=detach_norm)
    for name, zeros in (("d_magnitude_row", slice(4)), ("d_magnitude_col", slice(5, 7))):
        assert results[name][zeros].abs().min() > 1e-3 * results[name].abs().mean(), name
    assert results["y"][:, :4].float().abs().max() < 1e-12
    assert results["d_x"][:, 5:7].float().abs().max() < 1e-12


@backends
@orders
@dtypes
def test_zero_magnitudes_that_are_not_trained(backend, order, dtype, device):
    """No gradient of a magnitude is asked for, so nothing has to stand for its zero."""
    case = Case(**SMALL, dtype=dtype, bias=False)
    inputs = case.inputs(device)
    inputs["magnitude_row"][:4] = 0.0
    inputs["magnitude_col"][5:7] = 0.0
    results = check_layer(backend, inputs, case.upstream(device), norm_order=order, trained=("x",))
    with torch.no_grad():
        y = bora_linear(**inputs, scaling=SCALING, norm_order=order, backend=backend)
    for zeros in (y[:, :4], results["y"][:, :4], results["d_x"][:, 5:7]):
        assert zeros.float().abs().max() < 1e-12
    assert torch.isfinite(y).all() and y[:, 4:].any()


@backends
@orders
@pytest.mark.parametrize("member", ["bora", "dora", "columns"])
@pytest.mark.parametrize("rows, size", [(slice(3, 5), 1e-38), (slice(None), 1e-30)], ids=["some", "all"])
def test_tiny_magnitudes(backend, member, order, rows, size, device):
    """What a magnitude's gradient is of the magnitude itself, float32 cannot hold here."""
    case = Case(**SMALL, member=member)
    inputs = case.inputs(device)
    inputs["magnitude_col" if member == "columns" else "magnitude_row"][rows] = size
    check_layer(backend, inputs, case.upstream(device), norm_order=order)


@backends
@orders
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=NAMES.get)
@pytest.mark.parametrize("zeroed", [("row",), ("col",), ("row", "col")], ids="-".join)
def test_all_magnitudes_of_a_kind_zero(backend, order, dtype, zeroed, device):
    """Zeros of the axis normalized first make the other norms 0, which eps clamps to a scale of about 1e12.

    The stand-in of 2⁻⁶⁰ for a zero scale, so multiplied, leaves 1e-6 in place of 0: hence the floor.
    """
    case = Case(**SMALL, dtype=dtype)
    inputs = case.inputs(device)
    for axis in zeroed:
        inputs[f"magnitude_{axis}"].zero_()
    check_layer(backend, inputs, case.upstream(device), norm_order=order, floor=5e-5)


@backends
@orders
@conventions
@dtypes
def test_zero_rows_and_columns(backend, order, detach_norm, dtype, device):
    """Pruned or padded weights, with the magnitudes that initialization gives them."""
    case = Case(**SMALL, dtype=dtype)
    inputs = case.inputs(device)
    for name, axis in (("weight", 0), ("lora_B", 0), ("magnitude_row", 0)):
        inputs[name].index_fill_(axis, torch.tensor([0, 36], device=device), 0.0)
    for name, axis in (("weight", 1), ("lora_A", 1), ("magnitude_col", 0)):
        inputs[name].index_fill_(axis, torch.tensor([1, 52], device=device), 0.0)
    check_layer(backend, inputs, case.upstream(device), norm_order=order, detach_norm=detach_norm)


@backends
@orders
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=NAMES.get)
def test_zero_row_with_a_magnitude(backend, order, dtype, device):
    """Its scale is magnitude / eps, about 1e12: large, finite, and without effect on the other rows.

    The row decides the norm of d_lora_B alone, so it has as many ranks as the rule takes samples for granted.
    """
    case = Case(**(SMALL | {"R": 37}), dtype=dtype)
    inputs = case.inputs(device)
    inputs["weight"][3], inputs["lora_B"][3] = 0.0, 0.0
    results = check_layer(backend, inputs, case.upstream(device), norm_order=order)
    assert results["d_lora_B"][3].abs().max() > 1e6


@backends
@orders
@conventions
def test_norms_clamped_by_eps(backend, order, detach_norm, device):
    case = Case(**SMALL)
    inputs = case.inputs(device)
    inputs["weight"][:9] *= 0.1
    inputs["lora_B"][:9] *= 0.1
    inputs["weight"][:, 20:] *= 0.1
    inputs["lora_A"][:, 20:] *= 0.1
    check_layer(backend, inputs, case.upstream(device), norm_order=order, detach_norm=detach_norm, eps=0.3)


@backends
@dtypes
@orders
def test_large_bias_costs_the_magnitude_gradients_nothing(backend, dtype, order, device):
    case = Case(**SMALL, dtype=dtype, order=order)
    inputs, dy = case.inputs(device), case.upstream(device)
    with_bias = {}
    for size in (0, 100):
        scaled = inputs | {"bias": inputs["bias"] * size}
        with_bias[size] = check_layer(backend, scaled, dy, norm_order=order)
    for name in with_bias[0].keys() - {"y"}:
        assert torch.equal(with_bias[0][name], with_bias[100][name]), name


@backends
@pytest.mark.parametrize("scaling", [0.0, -2.0, 1e-4, 64.0])
def test_scaling(backend, scaling, device):
    case = Case(**SMALL, dtype=BF16)
    check_layer(backend, case.inputs(device), case.upstream(device), scaling=scaling)


NON_FINITE = {"x": (2, 5), "dy": (2, 5), "lora_A": (1, 5), "lora_B": (7, 1), "weight": (7, 5), "bias": (7,)}
NON_FINITE |= {"magnitude_row": (7,), "magnitude_col": (5,)}


@backends
@orders
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name, index", NON_FINITE.items(), ids=NON_FINITE)
def test_non_finite_values_pass_through(backend, order, value, name, index, device):
    """From data to exactly what depends on it; from a parameter at least to that."""
    require(backend, BF16)
    case = Case(**SMALL, dtype=BF16)
    tensors = case.inputs(device) | {"dy": case.upstream(device)}
    tensors[name][index] = value
    dy = tensors.pop("dy")
    options = {"scaling": SCALING, "norm_order": order}
    actual = run(bora_linear, tensors, dy, backend=backend, **options)
    plain = run(bora_linear_ref, tensors, dy, **options)
    assert not all(value.isfinite().all() for value in plain.values())
    if name.startswith("magnitude"):
        actual, plain = ({key: results[key] for key in ("y", "d_x")} for results in (actual, plain))
    assert_same_finite(actual, plain, exactly=name in ("x", "dy", "bias"))


# ---- dropout ----

DROPOUT_P = 0.25


def dropped_layer(backend, inputs, seed, **options):
    torch.manual_seed(seed)
    options = {"scaling": SCALING, "dropout_p": DROPOUT_P, "training": True, **options}
    return bora_linear(**inputs, backend=backend, **options)


def probed_mask(backend, shape, dtype, seed, device):
    """What the backend keeps of an x of this shape: without a base, A = B = 1 make the layer drop(x)."""
    eye = torch.eye(shape[-1], device=device)
    inputs = {"x": torch.ones(shape, dtype=dtype, device=device), "lora_A": eye, "lora_B": eye}
    inputs |= {"weight": torch.zeros_like(eye, dtype=dtype), "magnitude_row": None, "magnitude_col": None}
    dropped = dropped_layer(backend, inputs, seed, scaling=1.0)
    kept = torch.tensor(1 / (1 - DROPOUT_P), device=device).to(dtype)
    assert ((dropped == 0) | (dropped == kept)).all()
    return dropped != 0


@backends
def test_dropout_keeps_its_share(backend, device):
    require(backend, torch.float32)
    keep = probed_mask(backend, (200, 64), torch.float32, seed=1, device=device).double()
    deviation = (DROPOUT_P * (1 - DROPOUT_P)) ** 0.5
    for dim, size in ((None, 200 * 64), (0, 200), (1, 64)):
        share = keep.mean() if dim is None else keep.mean(dim)
        assert (share - (1 - DROPOUT_P)).abs().max() < 5 * deviation / size**0.5
    for lag, dim in ((1, 0), (1, 1), (32, 0), (32, 1)):  # neighbours and blocks are independent
        both = keep * keep.roll(lag, dim)
        assert abs(both.mean() - (1 - DROPOUT_P) ** 2) < 5 * deviation / (200 * 64) ** 0.5


@backends
@variants
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=NAMES.get)
def test_dropout_gradients_use_the_mask_of_the_forward(backend, member, order, dtype, device):
    require(backend, dtype)
    case = Case(37, 50, 40, 3, dtype=dtype, member=member)
    mask = probed_mask(backend, (37, 40), dtype, seed=5, device=device)
    options = {"norm_order": order, "dropout_p": DROPOUT_P, "training": True}
    check_layer(backend, case.inputs(device), case.upstream(device), mask=mask, seed=5, **options)


@backends
def test_dropout_follows_the_seed_and_the_mode(backend, device):
    require(backend, torch.float32)
    inputs = Case(**SMALL).inputs(device)
    first, again, other = (dropped_layer(backend, inputs, seed) for seed in (1, 1, 2))
    plain = bora_linear(**inputs, scaling=SCALING, backend=backend)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, plain)
    assert torch.equal(dropped_layer(backend, inputs, 1, training=False), plain)
