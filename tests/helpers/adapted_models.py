"""A small pretrained model for tests of adapter files, converted and trained a little."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bora_kernels import convert, save_adapter

K, N = 8, 12
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 3 * K).view(3, K)
methods = pytest.mark.parametrize("method", ["bora", "dora", "columns"])


class Model(nn.Module):
    """Linear layers, one of them in two places, a norm and a head."""

    def __init__(self, shared=True):
        super().__init__()
        self.block = nn.ModuleDict({"up": nn.Linear(K, N), "down": nn.Linear(N, K, bias=False)})
        self.again = self.block["down"] if shared else nn.Linear(N, K)
        self.norm = nn.BatchNorm1d(K)
        self.head = nn.Linear(K, 2)

    def forward(self, x):
        x = self.norm(self.block["down"](self.block["up"](x).relu()))
        return self.head(self.again(self.block["up"](x)))


def base(dtype=torch.float32):
    """The same pretrained model each time."""
    torch.manual_seed(0)
    return Model().to(dtype)


def trained(dtype=torch.float32, head=False, **options):
    """A converted model whose every trained tensor is off its start."""
    model = convert(base(dtype), **{"r": 3, "alpha": 5, **options})
    if head:
        model.head.requires_grad_()
        model.norm.requires_grad_()
        model(X.to(dtype))  # moves the running statistics of the norm
    return perturb(model)


def perturb(model):
    """Move every trained tensor off its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def saved(folder, **options):
    model = trained(**options)
    save_adapter(model, folder)
    return model


def description(model):
    """Modules, parameters with their flags and all values."""
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return list(model.named_modules()), parameters, {n: t.tolist() for n, t in model.state_dict().items()}
