"""Clocks, memory and the machine.

On CUDA a step is timed by CUDA events around it, with a cold L2 cache. It is launched behind another one, as in a
training loop, so the host's time counts where it is longer than the device's. The same step on an idle device counts
all of the host's time until the first kernel, and as a CUDA graph none. On the CPU the clock is ``time.perf_counter``.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bora_kernels

_WARMUP_SECONDS = 0.03
_LIBRARIES = ("torch", "triton", "peft", "transformers", "bitsandbytes", "liger-kernel", "pytest-benchmark")
CLOCKS = {
    "cuda": "CUDA events around one step that is launched behind another one, with a cold L2 cache",
    "cpu": "time.perf_counter around one step",
}


class _Tick:
    """A moment on the device's clock; the difference of two is in seconds, as pytest-benchmark expects."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: _Tick) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def cuda_events() -> _Tick:
    """The timer for CUDA devices."""
    return _Tick()


def timer(device: torch.device) -> Callable:
    return cuda_events if device.type == "cuda" else time.perf_counter


def behind_another(step: Callable, device: torch.device) -> Callable[[], None]:
    """What runs before each timed step: the step itself, and the L2 cache is emptied; nothing waits for the device."""
    if device.type != "cuda":
        return lambda: None

    def queue() -> None:
        step()
        _flush(device)

    return queue


def on_idle_device(device: torch.device) -> Callable[[], None]:
    """The same for a step that the device waits for."""

    def wait() -> None:
        _flush(device)
        torch.cuda.synchronize(device)

    return wait


def _flush(device: torch.device) -> None:
    """Empty the L2 cache: a pass over twice its size, so that it takes no longer than it must."""
    _scratch(device).zero_()


@functools.lru_cache
def _scratch(device: torch.device) -> torch.Tensor:
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.int8, device=device)


def once(step: Callable, device: torch.device, setup: Callable) -> float:
    """Seconds of one step."""
    setup()
    clock = timer(device)
    start = clock()
    step()
    return clock() - start


def warm_up(step: Callable, device: torch.device, setup: Callable) -> float:
    """Run until nothing is new any more; returns the seconds of a step."""
    once(step, device, setup)
    seconds = [once(step, device, setup) for _ in range(2)]
    while sum(seconds) < _WARMUP_SECONDS:
        seconds.append(once(step, device, setup))
    return statistics.median(seconds)


def rounds_for(seconds: float, budget: float, least: int = 10, most: int = 200) -> int:
    """Rounds that fit the budget (in seconds), within limits."""
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


def median_seconds(
    step: Callable, device: torch.device, setup: Callable, budget: float, least: int = 10, most: int = 200
) -> float:
    """Median of as many steps as fit the budget."""
    rounds = rounds_for(warm_up(step, device, setup), budget, least, most)
    return statistics.median(once(step, device, setup) for _ in range(rounds))


def graph_seconds(step: Callable, device: torch.device, budget: float) -> float:
    """Median seconds of the step replayed as a CUDA graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return median_seconds(graph.replay, device, behind_another(graph.replay, device), budget)


def peak_bytes(step: Callable, device: torch.device) -> int | None:
    """Most bytes allocated at once during a step over what was there before it; None on the CPU: nobody counts.

    Before it are the weights, the adapters, x and dy. Gradients, of x and of the parameters, are new tensors of
    the step for every provider, as they are after ``zero_grad(set_to_none=True)``.
    """
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def gemm_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one square matrix product of random values: 8192³ on CUDA, 1024³ on the CPU."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    setup = behind_another(lambda: a @ b, device)
    return 2 * size**3 / median_seconds(lambda: a @ b, device, setup, 0.5, 5, 30) / 1e12


def environment(device: torch.device, commit: str | None) -> dict[str, object]:
    """The machine, the versions and the commit, as the report prints them."""
    versions = {"python": platform.python_version(), "bora_kernels": bora_kernels.__version__}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": platform.processor() or platform.machine(),
        "device_type": device.type,
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "system": platform.system(),
        "versions": versions,
        "commit": commit or _git_commit(),
        "clock": CLOCKS.get(device.type, CLOCKS["cpu"]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
        result["device"] = properties.name
        result["gpu"] = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        if limits := _nvidia_smi("driver_version,power.limit,clocks.max.sm,clocks.max.mem"):
            result["gpu"] += ", driver {}, {}, at most {} (cores) and {} (memory)".format(*limits)
    else:
        result["device"] = _cpu_name()
    return result


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine() or "unknown CPU"


def _git_commit() -> str:
    """The commit of the sources, with "+changes" where tracked files differ from it."""
    folder = Path(__file__).resolve().parent
    commit = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return "unknown"
    return commit + ("+changes" if _output(["git", "-C", str(folder), "status", "--porcelain", "-uno"]) else "")


def _nvidia_smi(query: str) -> list[str] | None:
    output = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"])
    fields = [field.strip() for field in output.splitlines()[0].split(",")] if output else []
    return fields if len(fields) == query.count(",") + 1 else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
