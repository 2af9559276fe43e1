"""Second derivatives: the reference has them, the fused backends refuse them however they are asked for."""

import pytest
import torch
from helpers.cases import Case, require
from torch import nn

from bora_kernels import FusedBoraLinear, bora_linear
from bora_kernels.functional import bora_conv

SMALL = {"M": 5, "N": 20, "K": 24, "R": 2}
FUSED = ("torch", "triton")
TRAINED = ("x", "lora_A", "lora_B", "magnitude_row", "magnitude_col")


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_second_derivative(backend, device):
    require(backend, torch.float32)
    inputs = {n: None if t is None else t.requires_grad_(n in TRAINED) for n, t in Case(**SMALL).inputs(device).items()}
    y = bora_linear(**inputs, scaling=0.5, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    if backend == "reference":
        dx.square().sum().backward()
        assert inputs["lora_B"].grad.abs().max() > 0
    else:
        with pytest.raises(RuntimeError, match="no second derivative: backend=.reference. has"):
            dx.square().sum().backward()


@pytest.mark.parametrize("asked", ["backward", "all leaves", "one leaf"])
@pytest.mark.parametrize("differentiated", ["x", "magnitude_row", "lora_B"])
@pytest.mark.parametrize("backend", FUSED)
def test_a_penalty_on_gradients_is_refused_and_not_left_out(backend, differentiated, asked, device):
    """The gradient that comes into the layer is a constant here, which hides the second derivative from PyTorch."""
    require(backend, torch.float32)
    layer = FusedBoraLinear(24, 20, r=2, device=device)
    nn.init.normal_(layer.lora_B)
    layer.backend = backend
    x = torch.randn(5, 24, device=device, requires_grad=True)
    y = layer(x).sum()
    leaf = x if differentiated == "x" else getattr(layer, differentiated)
    (gradient,) = torch.autograd.grad(y, leaf, create_graph=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    loss = y + gradient.square().sum()
    with pytest.raises(RuntimeError, match='no second derivative: backend="reference" has'):
        if asked == "backward":
            loss.backward()
        else:
            torch.autograd.grad(loss, leaves if asked == "all leaves" else layer.lora_A)


def test_a_penalty_on_magnitudes_of_a_convolution_is_refused_and_not_left_out():
    weight = torch.randn(6, 4, 3)
    A, B = torch.randn(2, 4, 3, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    row, col = torch.rand(6, requires_grad=True), torch.rand(4, requires_grad=True)
    x = torch.randn(2, 4, 9)
    y = bora_conv(x, weight, A, B, row, col, None, torch.nn.functional.conv1d, scaling=0.5).square().sum()
    (gradient,) = torch.autograd.grad(y, row, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative: backend="reference" has'):
        torch.autograd.grad(y + gradient.square().sum(), A)
