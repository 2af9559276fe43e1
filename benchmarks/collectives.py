"""What a step sends between ranks, how long the GPU is at it, and what ranks tell each other about a measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Lists each collective with the number of elements of its larger side, and the bytes of that."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self.sizes: list[int] = []

    @property
    def bytes(self) -> int:
        return sum(self.sizes)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.__name__.split(".")[0].strip("_")
        if "c10d" in operator.namespace and name not in ("wait_tensor", "wrap_tensor_autograd"):
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            largest = max(tensors, key=torch.Tensor.numel)
            self.seen.append((name, largest.numel()))
            self.sizes.append(largest.nbytes)
        return result


class Kernel(NamedTuple):
    """A kernel or copy of a GPU, in seconds of the profiler's clock."""

    start: float
    end: float
    name: str

    @property
    def is_collective(self) -> bool:
        return self.name.startswith("nccl")


def kernels(step: Callable, device: torch.device) -> list[Kernel]:
    """Everything that the GPU ran in two steps, in the order in which it started."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(2):
            step()
        torch.cuda.synchronize(device)
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    marks = ("nccl:", "FSDP::", "c10d::")  # of record_function, not of kernels
    return sorted(
        Kernel(event.time_range.start / 1e6, event.time_range.end / 1e6, event.name)
        for event in events
        if not getattr(event, "is_user_annotation", False) and not event.name.startswith(marks)
    )


def alone(some: list[Kernel], others: list[Kernel]) -> float:
    """Seconds in which at least one of some runs and none of the others."""
    return _covered([*some, *others]) - _covered(others)


def _covered(spans: list[Kernel]) -> float:
    """Seconds in which at least one of them runs."""
    total, reached = 0.0, float("-inf")
    for start, end, *_ in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def communication(step: Callable, device: torch.device, kind: Callable[[str, int], str]) -> dict:
    """The messages of a step and, on GPUs, how long they take, in seconds.

    Every rank calls it. ``kind(collective, elements)`` says what a message is counted as.

    Returns:
        "messages": for each kind "count", "bytes" (the whole tensors) and, on GPUs, "transfer".
        "communication": the time of the kernels of the messages; each begins when its own rank is ready, so that
            waiting for another rank is part of it. "exposed": the part in which nothing else runs on the device. Both
            of the rank where they are longest.
        "transfer": the same with each message as short as on the rank where it is shortest: it waits for no other.
        "unmatched": in place of "transfer", where kernels could not be told apart: why.
    """
    with Collectives() as sent:
        step()
    kinds = [kind(*message) for message in sent.seen]
    messages: dict[str, dict] = {name: {"count": 0, "bytes": 0} for name in kinds}
    for name, size in zip(kinds, sent.sizes, strict=True):
        messages[name]["count"] += 1
        messages[name]["bytes"] += size
    if device.type != "cuda" or not kinds:
        return {"messages": messages}
    ran = kernels(step, device)  # two steps: in the first, ranks wait for the profiler of others
    of_messages = [kernel for kernel in ran if kernel.is_collective]
    last, others = of_messages[-len(kinds) :], [kernel for kernel in ran if not kernel.is_collective]
    durations = [kernel.end - kernel.start for kernel in last]
    result = {"messages": messages, "communication": max(gathered(sum(durations)))}
    result["exposed"] = max(gathered(alone(last, others)))
    of_ranks = gathered(durations if len(of_messages) == 2 * len(kinds) else None)
    if None in of_ranks:
        return result | {"unmatched": f"{len(of_messages)} kernels in two steps of {len(kinds)} messages"}
    shortest = [min(ranks) for ranks in zip(*of_ranks, strict=True)]
    for name, seconds in zip(kinds, shortest, strict=True):
        messages[name]["transfer"] = messages[name].get("transfer", 0.0) + seconds
    return result | {"transfer": sum(shortest)}


# --- between ranks ----------------------------------------------------------------------------------------------------


def average_gradients(result: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """A result of each rank with the gradients of its parameters averaged over the ranks, as data parallelism does."""
    averaged = {}
    for kind, tensors in result.items():
        if kind not in ("y", "dx"):
            tensors = [tensor.float() for tensor in tensors]
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= dist.get_world_size()
        averaged[kind] = tensors
    return averaged


def together(function: Callable, *arguments: Any) -> Any:
    """Call it on every rank; where it raises on one it raises on all, so that none goes on to wait for another."""
    result, error = None, None
    try:
        result = function(*arguments)
    except Exception as caught:
        error = caught
    problems = gathered(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise RuntimeError(f"rank {rank}: {problem}")
    return result


def gathered(value: Any) -> list[Any]:
    """What each rank has, by way of pickle."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
