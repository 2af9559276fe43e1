"""Long rows and columns of W0 that the update cancels: their norms are right to a fraction of what is left."""

import pytest
import torch
from conftest import CUDA
from helpers.cases import (
    HALVES,
    NAMES,
    SCALING,
    VARIANTS,
    Case,
    backends,
    cancelled,
    check_layer,
    dtypes,
    orders,
    require,
)

from bora_kernels.contract import Adapter, Options, split_scales
from bora_kernels.ops import operators

# What norms may err beside twice the error of float32 sums: the products of a bf16 weight are made of two bf16 terms.
BOUNDS = {torch.float32: 4e-6, torch.float16: 4e-6, torch.bfloat16: 2e-5}


def scales(inputs, backend, order, dtype=None):
    tensors = {name: t if dtype is None else t.to(dtype) for name, t in inputs.items()}
    adapter = Adapter(*(tensors[name] for name in Adapter._fields))
    options = Options(SCALING, order, backend=backend)
    made = operators.forward(
        tensors["x"], tensors["weight"], adapter, None, None, None, options, products=True, save_product=False
    )[3]
    return split_scales(made, inputs["weight"].shape, inputs["lora_A"].shape[0], adapter.members)[:4]


@backends
@orders
@dtypes
@pytest.mark.parametrize("left", [0.3, 1e-3])
@pytest.mark.parametrize("axis", ["row", "col"])
@pytest.mark.parametrize("N, K, R", [(40, 70, 5), (35, 33, 20)])
def test_norms(backend, order, dtype, left, axis, N, K, R, device):
    require(backend, dtype)
    inputs = cancelled(Case(4, N, K, R, dtype=dtype, bias=False).inputs(device), axis, left)
    del inputs["bias"]
    exact = scales(inputs, "torch", order, torch.float64)
    plain = scales(inputs, "torch", order, torch.float32)
    for name, value, one, true in zip(("ρ", "a", "γ", "g"), scales(inputs, backend, order), plain, exact, strict=True):
        error, plain_error = (((t - true) / true).abs().max().item() for t in (value, one))
        assert error <= 2 * plain_error + BOUNDS[dtype], (name, NAMES[dtype], error, plain_error)


@pytest.mark.skipif(CUDA, reason="half-precision products round an operand of W0's size")
@pytest.mark.parametrize("member, order", VARIANTS, ids=map("-".join, VARIANTS))
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize("axis, left", [("row", 0.05), ("row", 1e-3), ("col", 0.05), ("col", 1e-3)])
def test_layers_of_pytorch_operations_on_a_cpu(dtype, member, order, axis, left, device):
    for seed, (N, K, R) in enumerate([(40, 70, 5), (35, 33, 20)]):
        case = Case(21, N, K, R, dtype=dtype, member=member, order=order, bias=seed == 0, seed=seed)
        check_layer("torch", cancelled(case.inputs(device), axis, left), case.upstream(device), norm_order=order)
