"""The engine against the package: the same losses and gradients through ``bora_kernels.bora_linear``, run by run.

Of full fine-tuning and of the head alone, which have no such layers, it is the batch against each run alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bora_kernels import bora_linear

from .graphs import captured
from .methods import METHODS, Layers, Parameters, full_precision
from .tasks import Task, methods_of
from .training import RANK, SCALING, gradients_of, start

_SEEDS, _BATCH = (3, 8), 4
LIMIT = 1e-3  # of a difference over the size of what is compared; float32's rounding gives about 1e-5


class PackageLayers(Layers):
    """The layers of one run as the package computes them."""

    def __call__(self, name: str, x: Tensor, scales: tuple | None = None) -> Tensor:
        method, weight = self.method, self.weights[name]
        if not method.is_adapter:
            return super().__call__(name, x, scales)
        own = [self.parameters.get(f"{name}.{part}") for part in ("A", "B", "row", "col")]
        A, B, row, col = (None if t is None else t[0] for t in own)
        if A is None or B is None:  # magnitudes alone: an update that stays zero
            A, B = weight.new_zeros(1, weight.shape[1]), weight.new_zeros(weight.shape[0], 1)
        return bora_linear(
            x[0], weight, A, B, row, col, self.biases.get(name),
            scaling=self.scaling, norm_order=method.order, detach_norm=method.detached,
        )[None]  # fmt: skip


def check(model, task: Task, graph: bool = True) -> dict[str, float]:
    """The largest relative difference of losses and of gradients between the engine and the package, by method.

    A batch of two runs, on a GPU by way of a CUDA graph, is compared with each run alone in the package, in full
    float32. The graph is captured at the start and replayed on other parameters and examples. Raises RuntimeError for
    a difference over LIMIT.
    """
    found = {}
    for name in methods_of(task.name):
        method = METHODS[name]
        layers = start(model, task, method, list(_SEEDS), RANK, SCALING)
        rows = torch.stack([task.batch_order(seed)[0][:_BATCH] for seed in _SEEDS]).to(task.device)
        with full_precision():
            compute = captured(gradients_of(model, task, layers), rows.flip(0), graph)
            _move(layers.parameters)
            loss, *gradients = compute(rows)
            differences = []
            for i in range(len(_SEEDS)):
                one = {key: t[i : i + 1].detach().requires_grad_() for key, t in layers.parameters.items()}
                alone = PackageLayers(method, model.weights, model.biases, one, SCALING)
                expected, *wanted = gradients_of(model, task, alone)(rows[i : i + 1])
                differences.append(abs(loss[i] - expected[0]) / abs(expected[0]))
                pairs = [(g[i] - w[0], w[0]) for g, w in zip(gradients, wanted, strict=True)]
                if not method.is_adapter:  # together: some biases of attention have a gradient of zero
                    difference, size = (torch.cat([t.flatten() for t in side]) for side in zip(*pairs, strict=True))
                    pairs = [(difference, size)]
                differences += [difference.norm() / size.norm() for difference, size in pairs]
        found[name] = max(float(difference) for difference in differences)
        if not found[name] < LIMIT:
            raise RuntimeError(f"{name}: the engine must agree with the package to {LIMIT}, got {found[name]:.1e}")
    return found


@torch.no_grad()
def _move(parameters: Parameters) -> None:
    """Move parameters off their start, where B is zero and A has no gradient."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in parameters.items():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        tensor += 0.05 * (noise * tensor if name.endswith((".row", ".col")) else noise)
