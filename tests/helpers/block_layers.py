"""Projections for tests of blocks, the reference of each, and the results of both."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bora_kernels.blocks import Projection
from bora_kernels.contract import Adapter, Options
from bora_kernels.reference import bora_linear_ref

K, I, N, R = 20, 24, 18, 3  # beyond the sizes that are evaluated densely
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEMBERS = {
    "bora": (True, True),
    "dora": (True, False),
    "columns": (False, True),
    "lora": (False, False),
    "frozen": None,
}


def make_layer(n, k, kind, bias=False, dtype=torch.float32, trained=True, seed=0, **options):
    """A projection whose adapter is off its start."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    weight = (draw(n, k) / k**0.5).to(dtype)
    offset = draw(n).to(dtype) if bias else None
    if kind == "frozen":
        return Projection(weight, offset)
    row, col = MEMBERS[kind]
    adapter = Adapter(
        draw(R, k) * k**-0.5,
        0.3 * draw(n, R),
        weight.float().norm(dim=1) * (1 + 0.1 * draw(n)) if row else None,
        weight.float().norm(dim=0) * (1 + 0.1 * draw(k)) if col else None,
    )
    adapter = adapter.map(lambda t: t.requires_grad_(trained))
    return Projection(weight, offset, adapter, Options(0.7, **options))


def exactly(layer):
    """The same layer in float64, for the reference."""
    weight, bias, adapter, options, _ = layer
    adapter = adapter and adapter.map(lambda t: t.detach().double().requires_grad_(t.requires_grad))
    return Projection(weight.double(), None if bias is None else bias.double(), adapter, options)


def reference(x, layer):
    weight, bias, adapter, options, _ = layer
    if adapter is None:
        return F.linear(x, weight, bias)
    keywords = {"scaling": options.scaling, "norm_order": options.norm_order, "detach_norm": options.detach_norm}
    return bora_linear_ref(x, weight, *adapter, bias, **keywords)


def results(outputs, x, layers, seed=9):
    """Outputs and all gradients there are, for gradients of the outputs that depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    dys = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    adapters = [
        (i, name, t) for i, layer in enumerate(layers) for name, t in (layer.adapter or Adapter(x, x))._asdict().items()
    ]
    named = {f"{i}.{name}": t for i, name, t in adapters if t is not None and t is not x and t.requires_grad}
    if x.requires_grad:
        named["x"] = x
    gradients = torch.autograd.grad(outputs, list(named.values()), dys, allow_unused=True)
    assert all(g is not None for g in gradients)
    return {**{f"y{i}": y.detach() for i, y in enumerate(outputs)}, **dict(zip(named, gradients, strict=True))}


def tokens(dtype=torch.float32, shape=(2, 5, K), grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype).requires_grad_(grad)
