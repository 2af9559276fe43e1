"""Small batches: forward, loss, backward and AdamW captured into one CUDA graph, and replayed for every step.

    python examples/captured_step.py

With few tokens the host that launches kernels is the limit, not the device; a graph launches a whole step at once. It
reads and writes the memory that it was captured with, so each batch is copied into the same tensors. A small network is
trained eagerly and by a graph, from one start and on the same batches. On a CPU, which has none, only eagerly.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import bora_kernels

WARM_UP = 3  # steps before the capture: kernels are compiled, and the optimizer makes its state


class GatedMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Network(nn.Module):
    """Gated MLPs behind norms, as in Llama."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(width, eps=1e-6) for _ in range(blocks)])
        self.mlps = nn.ModuleList([GatedMLP(width) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return x


class CapturedStep:
    """Calls a step eagerly while it warms up, then captures it, and replays the graph from then on.

    All that the step reads must stay where it is: parameters, the optimizer's state, and the inputs, which are copied
    into tensors of the graph's own. The step must not wait for the device, nor keep an autograd graph.
    """

    def __init__(self, step: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.step = step
        self.inputs = [t.clone() for t in inputs]
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            if given.shape != static.shape:  # copy_ would broadcast
                raise ValueError(f"inputs must be {list(static.shape)}, as in the capture, got {list(given.shape)}")
            static.copy_(given)
        self.calls += 1
        if self.calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):  # records the step, and runs nothing
                self.loss = self.step(*self.inputs)
        self.graph.replay()
        return self.loss.clone()  # the next replay writes over it


def train(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], learning_rate: float, *, captured: bool
) -> tuple[list[float], float]:
    """A step on each batch, at a rate that falls to zero: the losses, and the milliseconds of a step once warm."""
    device = batches[0][0].device
    on_gpu = device.type == "cuda"
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = torch.tensor(learning_rate, device=device)  # a float would stay in the graph as it was in the capture
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True, capturable=on_gpu)

    def step(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()  # without its autograd graph, which must not live on into a capture

    run = CapturedStep(step, *batches[0]) if captured else step
    losses = []
    for i, batch in enumerate(batches):
        if i == WARM_UP + 1:
            start = _now(device)
        rate.fill_(learning_rate * (1 - i / len(batches)))
        losses.append(run(*batch))
    milliseconds = 1e3 * (_now(device) - start) / (len(batches) - WARM_UP - 1)
    return torch.stack(losses).tolist(), milliseconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def student_and_batches(
    *, width: int, blocks: int, tokens: int, steps: int, rank: int, device: str, dtype: torch.dtype
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """An adapted network at its start, and what a twin with other adapters makes of random inputs."""
    network = Network(width, blocks).to(device, dtype)
    student, teacher = (
        bora_kernels.fuse(bora_kernels.convert(copy.deepcopy(network), r=rank, alpha=2 * rank)) for _ in range(2)
    )
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.5)
        inputs = [torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(steps)]
        return student, [(x, teacher(x)) for x in inputs]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="in a batch (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    options = parser.parse_args(arguments)
    if options.steps < 2 * WARM_UP:
        parser.error(f"--steps must be {2 * WARM_UP} or more, got {options.steps}")

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    sizes = {name: getattr(options, name) for name in ("width", "blocks", "tokens", "steps", "rank")}
    model, batches = student_and_batches(**sizes, device=device, dtype=dtype)
    twin = copy.deepcopy(model)
    print(bora_kernels.explain(model))

    eager, milliseconds = train(model, batches, options.learning_rate, captured=False)
    print(f"eager, {milliseconds:.2f} ms a step, loss {eager[0]:.5f} to {eager[-1]:.5f}")
    if not on_gpu:
        print("CUDA graphs need a CUDA device, and there is none: eager steps only")
        return
    graph, milliseconds = train(twin, batches, options.learning_rate, captured=True)
    print(f"graph, {milliseconds:.2f} ms a step, loss {graph[0]:.5f} to {graph[-1]:.5f}")
    largest = max(abs(a - b) for a, b in zip(eager, graph, strict=True))
    print(f"largest difference of their losses {largest:.1e}")


if __name__ == "__main__":
    main()
