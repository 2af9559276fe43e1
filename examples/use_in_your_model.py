"""BoRA in a model of your own, in plain PyTorch: convert, train, save, load, merge. Runs in seconds on a CPU.

    python examples/use_in_your_model.py

A small network first learns sin(x), which stands for pretraining. Fine-tuning then teaches it sin(x + 1/2) by adapters
alone: the pretrained weights stay as they are, and only the adapter is saved.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from torch import Tensor, nn

import bora_kernels


class Network(nn.Module):
    """Any module with ``torch.nn.Linear`` layers will do."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inlet = nn.Linear(1, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for layer in self.hidden:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def train(model: nn.Module, shift: float, steps: int, learning_rate: float) -> float:
    """Fit sin(x + shift); returns the last loss. The optimizer gets what requires a gradient, as in any fine-tuning."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    x = torch.linspace(-3, 3, 256)[:, None]
    for _ in range(steps):
        loss = (model(x) - torch.sin(x + shift)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("bora", "dora"), default="bora")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    pretrained = Network()
    print(f"pretraining, loss {train(pretrained, 0.0, options.steps, 3e-3):.5f}")

    # 1. Convert in place: linear layers get adapters, everything else is frozen. "head" is left out by its name.
    model = bora_kernels.convert(
        copy.deepcopy(pretrained), r=options.rank, alpha=2 * options.rank, method=options.method
    )
    print(bora_kernels.explain(model))

    # 2. Train as always.
    print(f"fine-tuning, loss {train(model, 0.5, options.steps, 3e-3):.5f}")

    # 3. Save the adapter, and load it over the pretrained weights.
    with tempfile.TemporaryDirectory() as folder:
        bora_kernels.save_adapter(model, folder)
        loaded = bora_kernels.load_adapter(copy.deepcopy(pretrained), folder)
    x = torch.linspace(-3, 3, 7)[:, None]
    print(f"loaded, largest difference {(loaded(x) - model(x)).abs().max():.1e}")

    # 4. Merge for serving: plain torch.nn.Linear layers again.
    bora_kernels.merge_adapter(loaded)
    print(f"merged, largest difference {(loaded(x) - model(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
