"""Launches that begin while the one before them runs: programmatic dependent launch, on Hopper GPUs.

What a launch costs beside its work, 1 µs, is spent under the end of the one before. A program waits for that end before
it touches memory, so that nothing else changes; then it lets those of the next launch begin.

Programs that begin early crowd on the multiprocessors that have room first. That is as good as any where each fills a
multiprocessor, or reads few bytes; those of a pass over memory begin when all multiprocessors are free.
"""

import triton
import triton.language as tl

from . import config


@triton.jit
def wait_for_last(OVERLAP: tl.constexpr):
    """At the head of a kernel: wait for the end of the launch before, and let programs of the next begin."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlapping(device_index: int, *, early: bool = True) -> dict:
    """Arguments of a launch whose kernel calls ``wait_for_last``; ``early`` says whether it may begin early itself.

    The first launch of a stage may not: what is before it is not this package's.
    """
    if config.target(device_index)[0] != 90:  # elsewhere it was not measured
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True} if early else {"OVERLAP": True}
