"""Time on the GPU of things that are compared with each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def times_in_turn(steps: dict[str, Callable[[], object]], rounds: int = 40) -> dict[str, float]:
    """Median milliseconds of steps that take turns, so that clocks and power limits drift for all of them alike.

    Each is launched behind another one: the host's time counts where it is longer than the device's. The order of the
    steps turns round each time, for what comes second in a round waits otherwise for the first.
    """
    ticks: dict[str, list] = {name: [] for name in steps}
    for step in [*steps.values()] * 5:  # compiles, and records what is replayed
        step()
    for turn in range(rounds):
        for name, step in [*steps.items()][:: -1 if turn % 2 else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            ticks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(start.elapsed_time(end) for start, end in pairs) for name, pairs in ticks.items()}
