"""Training many runs of one method on one task at once, and scoring them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .graphs import Compute, captured
from .methods import METHODS, Layers, Method, Parameters, initial_parameters
from .tasks import Task

RANK, SCALING = 4, 2.0


@dataclass(frozen=True)
class Run:
    """What distinguishes the runs of a batch."""

    seed: int
    lr: float
    magnitude_factor: float = 1.0  # the magnitudes' learning rate over ``lr``


class Adam:
    """Adam (0.9, 0.999) with learning rates for each run; no weight decay."""

    def __init__(self, parameters: Parameters, runs: list[Run]) -> None:
        self.parameters = list(parameters.values())
        self.first, self.second = ([torch.zeros_like(t) for t in self.parameters] for _ in range(2))
        self.t, self.rates = 0, []
        device = self.parameters[0].device
        plain = torch.tensor([run.lr for run in runs], device=device)
        own = torch.tensor([run.lr * run.magnitude_factor for run in runs], device=device)
        for name, tensor in parameters.items():
            rates = own if name.endswith((".row", ".col")) else plain
            self.rates.append(rates.view(-1, *[1] * (tensor.dim() - 1)))
        self.common_rate = runs[0].lr if all(run == Run(run.seed, runs[0].lr) for run in runs) else None

    @torch.no_grad()
    def step(self, gradients: list[Tensor], factor: float) -> None:
        """One step at ``factor`` times the learning rates."""
        self.t += 1
        torch._foreach_lerp_(self.first, gradients, 0.1)
        torch._foreach_mul_(self.second, 0.999)
        torch._foreach_addcmul_(self.second, gradients, gradients, 0.001)
        root = torch._foreach_sqrt(self.second)
        torch._foreach_div_(root, math.sqrt(1 - 0.999**self.t))
        torch._foreach_add_(root, 1e-8)
        update = torch._foreach_div(self.first, root)
        factor = -factor / (1 - 0.9**self.t)
        if self.common_rate is None:
            torch._foreach_mul_(update, factor)
            torch._foreach_mul_(update, self.rates)
        else:
            torch._foreach_mul_(update, factor * self.common_rate)
        torch._foreach_add_(self.parameters, update)


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at this step: 10 % linear warm-up, linear decay to 0."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def start(model, task: Task, method: Method, seeds: list[int], rank: int, scaling: float) -> Layers:
    """The adapted layers of a batch of runs at their start; every tensor in ``parameters`` is trained."""
    parameters = initial_parameters(method, model.weights, seeds, rank)
    parameters |= model.extra_parameters(method, len(seeds)) | task.head(seeds, model)
    for tensor in parameters.values():
        tensor.requires_grad_()
    return Layers(method, model.weights, model.biases, parameters, scaling)


def gradients_of(model, task: Task, layers: Layers) -> Compute:
    """Numbers of training examples [R, B] -> the loss of each run [R], and the gradient of each of the parameters."""
    trained = list(layers.parameters.values())

    def compute(rows: Tensor) -> tuple[Tensor, ...]:
        batch = [column[rows] for column in task.parts["train"]]
        loss = task.loss_and_hits(model, layers, batch)[0].mean(1)
        return loss.detach(), *torch.autograd.grad(loss.sum(), trained)

    return compute


def train(
    model,
    task: Task,
    method_name: str,
    runs: list[Run],
    *,
    rank: int = RANK,
    scaling: float = SCALING,
    watch: Callable[[int, Layers], None] | None = None,
    graph: bool = True,
) -> list[dict]:
    """Train all ``runs`` at once; a record for each.

    ``watch`` is called with the number of steps done and the layers: before the first step and after each. With
    ``graph`` a GPU takes the gradients of a step from a CUDA graph.
    """
    began, sizes, method, seeds = time.perf_counter(), task.sizes, METHODS[method_name], [run.seed for run in runs]
    layers = start(model, task, method, seeds, rank, scaling)
    optimizer = Adam(layers.parameters, runs)
    orders = {seed: task.batch_order(seed) for seed in set(seeds)}
    rows = torch.stack([orders[seed] for seed in seeds], 1).to(task.device)  # [steps, R, B]
    losses = []
    if watch is not None:
        watch(0, layers)
    compute = captured(gradients_of(model, task, layers), rows[0], graph)
    for step in range(sizes.steps):
        loss, *gradients = compute(rows[step])
        optimizer.step(gradients, schedule(step, sizes.steps))
        losses.append(loss.clone())
        if watch is not None:
            watch(step + 1, layers)
    del compute, loss, gradients  # the graph holds a step's activations
    last = torch.stack(losses[-max(1, sizes.steps // 10) :]).mean(0).tolist()
    found = {part: evaluate(model, task, layers, part, len(runs)) for part in ("validation", "test")}
    seconds = (time.perf_counter() - began) / len(runs)
    trained_count = sum(tensor[0].numel() for tensor in layers.parameters.values())
    records = []
    for i, run in enumerate(runs):
        record = {"task": task.name, "method": method_name, "seed": run.seed, "lr": run.lr, "rank": rank}
        record |= {"parameters": trained_count, "train_loss": last[i], "seconds": round(seconds, 3)}
        for part, values in found.items():
            record |= {part: values["score"][i], f"{part}_loss": values["loss"][i]}
        records.append(record)
    _mark_diverged(records, model, task)
    return records


@torch.no_grad()
def evaluate(model, task: Task, layers: Layers, part: str, runs: int) -> dict[str, list[float]]:
    """Score and loss of each run over a part of the data."""
    columns, sums = task.parts[part], torch.zeros(2, runs, device=task.device)
    examples = len(columns[0])
    chunk = max(1, task.sizes.eval_tokens // (runs * columns[0].shape[1]))
    for first in range(0, examples, chunk):
        batch = [column[first : first + chunk] for column in columns]
        loss, hits = task.loss_and_hits(model, layers, [column.expand(runs, *column.shape) for column in batch])
        sums += torch.stack([loss.sum(1), hits.sum(1)])
    loss, hits = sums / examples
    return {"score": task.score(part, loss, hits).tolist(), "loss": loss.tolist()}


def _mark_diverged(records: list[dict], model, task: Task) -> None:
    """Give a run with a loss or score that is not finite those of a model that learned nothing."""
    keys = ("train_loss", "validation", "validation_loss", "test", "test_loss")
    for record in records:
        record["diverged"] = not all(math.isfinite(record[key]) for key in keys)
        if not record["diverged"]:
            continue
        record["train_loss"] = None
        for part in ("validation", "test"):
            floor = task.floor(part)
            if floor is None:
                frozen = Layers(METHODS["head"], model.weights, model.biases, {}, SCALING)
                floor = {key: values[0] for key, values in evaluate(model, task, frozen, part, 1).items()}
            record |= {part: floor["score"], f"{part}_loss": floor["loss"]}
