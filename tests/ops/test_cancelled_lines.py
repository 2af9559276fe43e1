"""Long rows and columns of W0 that the update cancels: their norms are right to a fraction of what is left."""

import pytest
import torch
from helpers.cases import NAMES, SCALING, Case, backends, cancelled, dtypes, orders, require

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
