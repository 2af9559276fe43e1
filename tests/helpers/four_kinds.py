"""A small model with a layer of each kind that BoRA adapts through PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from bora_kernels.integrations.peft import BoraConfig  # noqa: E402

IDS = torch.arange(10).view(2, 5)


class Model(nn.Module):
    """An embedding, a convolution, and linear layers with and without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.up = nn.Embedding(11, 12), nn.Linear(12, 20)
        self.conv, self.down = nn.Conv1d(20, 6, 3, padding=1), nn.Linear(6, 4, bias=False)

    def forward(self, ids):
        x = self.up(self.tokens(ids)).relu()
        return self.down(self.conv(x.mT).mT)


def adapted(model, targets=("tokens", "up", "conv", "down")):
    torch.manual_seed(1)
    return peft.get_peft_model(model, BoraConfig(r=2, lora_alpha=4, target_modules=list(targets)))


def trained(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model
