"""Small updates of the trained parameters reach the output of a half-precision layer.

An optimizer step moves B or a magnitude by about 1e-3 relative, less than half a unit in the last place of a
bfloat16 weight: a fold that rounds to the nearest loses all of it. So the change Δy of the output is
regressed on the input, which averages the output's own rounding over the tokens and leaves what the layer
answers to:

    G = xᵀ·Δy / M        cosine = ⟨G, G*⟩ / ‖G‖‖G*‖        slope = ⟨G, G*⟩ / ‖G*‖²        G* in float64
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETING
from helpers.cases import require

from bora_kernels import bora_linear
from bora_kernels.contract import Adapter, Options
from bora_kernels.ops.adapted_weight import effective_weight
from bora_kernels.reference import bora_linear_ref, bora_weight_ref

pytestmark = pytest.mark.sampled(2)
M, N, K, R = 4096, 128, 64, 8
SCALING = 0.5
STEP = 1e-3
PERTURBED = ("lora_B", "magnitude_row", "magnitude_col")
SETTINGS = list(product(("torch", "triton"), ("row_col", "col_row"), ("start", "trained")))
orders = pytest.mark.parametrize("order", ("row_col", "col_row"))
if INTERPRETING:  # slow
    SETTINGS.remove(("triton", "col_row", "start"))
    SETTINGS.remove(("triton", "row_col", "trained"))


def make_layer(trained, device):
    """A bfloat16 base with float32 adapters, at initialization or after some training."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    weight = (randn(N, K) / K**0.5).bfloat16()
    layer = {"x": randn(M, K).bfloat16(), "weight": weight, "lora_A": randn(R, K) / K**0.5}
    layer["lora_B"] = randn(N, R) / R**0.5 if trained else torch.zeros(N, R, device=device)
    effective = weight + SCALING * layer["lora_B"] @ layer["lora_A"]
    for name, dim in (("magnitude_row", 1), ("magnitude_col", 0)):
        norm = torch.linalg.vector_norm(effective.float(), dim=dim)
        layer[name] = norm * (1 + 0.1 * randn(*norm.shape)) if trained else norm
    return layer


def perturbed(layer, name):
    """The layer with one parameter moved: a magnitude by STEP relative, B by what moves V as much."""
    generator = torch.Generator(layer["x"].device).manual_seed(1)
    step = torch.randn(layer[name].shape, generator=generator, device=layer["x"].device)
    if name == "lora_B":
        change = SCALING * step @ layer["lora_A"]
        step *= STEP * layer["weight"].float().norm() / change.norm()
    else:
        step = STEP * step.sign() * layer[name]
    return layer | {name: layer[name] + step}


def response(forward, before, after):
    """G, the least-squares answer of the output to the change, in float64."""
    change = forward(**after).double() - forward(**before).double()
    return before["x"].double().T @ change / M


def agreement(forward, layer, name, order="row_col"):
    """Cosine and slope of the answer to one perturbed parameter, against that of float64."""

    def exact_forward(**tensors):
        return bora_linear_ref(**tensors, scaling=SCALING, norm_order=order)

    moved = perturbed(layer, name)
    actual = response(forward, layer, moved)
    exact = response(exact_forward, *({key: t.double() for key, t in each.items()} for each in (layer, moved)))
    overlap = (actual * exact).sum()
    return (overlap / (actual.norm() * exact.norm())).item(), (overlap / exact.square().sum()).item()


def passes(cosine, slope):
    return cosine >= 0.9 and abs(slope - 1) <= 0.2  # false for NaN, the cosine of no answer at all


@pytest.mark.parametrize("backend, order, state", SETTINGS, ids=map("-".join, SETTINGS))
def test_small_updates_reach_the_output(backend, order, state, device):
    require(backend, torch.bfloat16)
    layer = make_layer(state == "trained", device)
    base = bora_linear(**layer, scaling=SCALING, norm_order=order, backend=backend)

    def forward(**tensors):
        if all(tensors[name] is layer[name] for name in layer):
            return base
        return bora_linear(**tensors, scaling=SCALING, norm_order=order, backend=backend)

    results = {name: agreement(forward, layer, name, order) for name in PERTURBED}
    assert all(passes(*result) for result in results.values()), results


def test_criterion_separates_the_dense_product_from_rounding_to_the_nearest(device):
    """At the start the dense float32 product, rounded, passes; g folded into x by rounding fails."""
    layer = make_layer(False, device)

    def dense(**tensors):
        wide = {name: t.float() for name, t in tensors.items()}
        return bora_linear_ref(**wide, scaling=SCALING).bfloat16()

    def folded(x, weight, magnitude_col, **rest):
        g = magnitude_col / layer["magnitude_col"]  # B = 0: the norms are the magnitudes of the start
        return F.linear((x * g).bfloat16(), weight)

    assert all(passes(*agreement(dense, layer, name)) for name in PERTURBED)
    assert not passes(*agreement(folded, layer, "magnitude_col"))


@orders
@pytest.mark.parametrize("name", PERTURBED)
def test_small_updates_reach_the_merged_weight(name, order, device):
    """Slope of W' − W0 on its exact value, for an untrained layer with one parameter moved.

    An element moves by a unit in the last place or not at all, so their cosine says little.
    """
    moved = perturbed(make_layer(False, device), name)
    del moved["x"]
    start = moved["weight"].double()
    exact = bora_weight_ref(**{key: t.double() for key, t in moved.items()}, scaling=SCALING, norm_order=order)
    merged = effective_weight(moved.pop("weight"), Adapter(**moved), Options(SCALING, order))

    def slope(weight):
        return ((weight.double() - start) * (exact - start)).sum() / (exact - start).square().sum()

    assert abs(slope(merged) - 1) <= 0.1
    assert not abs(slope(exact.to(merged.dtype)) - 1) <= 0.1  # rounded to the nearest
