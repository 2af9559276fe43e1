"""Training, prediction and the memory of a training step."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from .data import Batch, Encoded, evaluation_batches, training_batches
from .models import trained_parameters

_WARMUP = 0.1  # share of the steps over which the learning rate rises


def train(
    classifier: nn.Module,
    data: Encoded,
    *,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
    autocast: torch.dtype | None = None,
    description: str = "training",
) -> tuple[list[float], list[float]]:
    """The losses and the milliseconds of all steps.

    AdamW without weight decay; the learning rate rises over the first tenth and then falls linearly to 0. The encoder's
    own dropout stays off: so short a run has no need of it, and it would make runs noisier to compare. ``seed`` fixes
    the order of the data.
    """
    classifier.eval()
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(data.ids) // batch_size)
    warmup = max(1, int(_WARMUP * steps))
    optimizer = _optimizer(classifier, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    losses, step_ms = [], []
    with tqdm(total=steps, desc=description, unit="step", disable=None) as bar:
        for _ in range(epochs):
            for batch in training_batches(data, batch_size, generator):
                start = time.perf_counter()
                losses.append(_step(classifier, optimizer, batch, autocast))
                step_ms.append(1e3 * (time.perf_counter() - start))
                schedule.step()
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
                bar.update()
    return losses, step_ms


@torch.inference_mode()
def predict(classifier: nn.Module, data: Encoded, batch_size: int = 128, autocast: torch.dtype | None = None) -> Tensor:
    """Logits [examples, classes] on the CPU, in the order of the data."""
    classifier.eval()
    logits, indices = [], []
    for batch in evaluation_batches(data, batch_size):
        logits.append(_forward(classifier, _to_device(batch, classifier), autocast).float().cpu())
        indices.append(batch.indices)
    return torch.cat(logits)[torch.cat(indices).argsort()]


def step_memory(classifier: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> int:
    """Peak bytes that one training step adds to the model: activations, gradients, optimizer state, scratch.

    As PyTorch's allocators see it: ``max_memory_allocated`` on CUDA, the profiler's record of all allocations
    and releases on the CPU. The step changes the classifier, so give it one that is not needed any more.
    """
    classifier.eval()
    optimizer = _optimizer(classifier, learning_rate=1e-6)
    batch = _to_device(batch, classifier)
    gc.collect()  # nothing of an earlier model may be released during the step
    if batch.labels.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(classifier, optimizer, batch, autocast)
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder, _quiet_stderr():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _step(classifier, optimizer, batch, autocast)
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _step(classifier: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, autocast: torch.dtype | None) -> float:
    batch = _to_device(batch, classifier)
    loss = F.cross_entropy(_forward(classifier, batch, autocast).float(), batch.labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()  # waits for the device, so that a clock around this function reads the whole step


def _forward(classifier: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    with torch.autocast(batch.labels.device.type, dtype=autocast, enabled=autocast is not None):
        return classifier(batch.input_ids, batch.attention_mask)


def _optimizer(classifier: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained_parameters(classifier).values(), lr=learning_rate, weight_decay=0.0)


def _to_device(batch: Batch, classifier: nn.Module) -> Batch:
    device = next(classifier.parameters()).device
    return replace(
        batch, **{name: getattr(batch, name).to(device) for name in ("input_ids", "attention_mask", "labels")}
    )


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard what C++ code writes to stderr: the profiler announces itself there."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
