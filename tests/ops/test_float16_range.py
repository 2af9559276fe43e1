"""float16's range: scales far from 1 whose product is W's own."""

import pytest
import torch
from helpers.cases import Case, backends, check_layer, conventions, orders

pytestmark = pytest.mark.sampled(4)
FP16 = torch.float16


@backends
@orders
@conventions
@pytest.mark.parametrize("c", [1e-5, 300.0, 1e4])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
def test_first_magnitude_times_anything(backend, order, detach_norm, c, bias, device):
    """W' does not feel a factor of the magnitude that is normalized away."""
    case = Case(33, 40, 70, 5, dtype=FP16, order=order, bias=bias, seed=2)
    inputs = case.inputs(device)
    name = "magnitude_row" if order == "row_col" else "magnitude_col"
    inputs[name] *= c
    inputs[name][3:5] = 0.0
    check_layer(backend, inputs, case.upstream(device), norm_order=order, detach_norm=detach_norm)


@backends
@orders
@pytest.mark.parametrize("c", [1e-3, 1e4])
def test_base_and_first_magnitude_times_anything(backend, order, c, device):
    """Norms of 1e4 and 1e-3: W' is of the size that the second magnitude says."""
    case = Case(33, 40, 70, 5, dtype=FP16, order=order, seed=3)
    inputs = case.inputs(device)
    first = "magnitude_row" if order == "row_col" else "magnitude_col"
    for name in ("weight", "lora_B", first):
        inputs[name] *= c
    assert inputs["weight"].isfinite().all()
    check_layer(backend, inputs, case.upstream(device), norm_order=order)


@backends
@pytest.mark.parametrize("member", ["dora", "columns"])
@pytest.mark.parametrize("c", [1e-4, 1e3])
def test_a_single_scale(backend, member, c, device):
    """Without a second one no factor is free to move: the scale is as far from 1 as W' is from W0, which has room."""
    case = Case(33, 40, 70, 5, dtype=FP16, member=member, seed=4)
    inputs = case.inputs(device)
    for name in ("weight", "lora_B"):
        inputs[name] *= c
    check_layer(backend, inputs, case.upstream(device))


@backends
@orders
@pytest.mark.parametrize("adapter_dtype", [torch.float32, FP16], ids=str)
def test_magnitudes_of_any_dtype(backend, order, adapter_dtype, device):
    case = Case(33, 40, 70, 5, dtype=FP16, order=order, adapter_dtype=adapter_dtype)
    inputs = case.inputs(device)
    inputs["magnitude_row" if order == "row_col" else "magnitude_col"] *= 1e3
    check_layer(backend, inputs, case.upstream(device), norm_order=order)
