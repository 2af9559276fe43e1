"""A training step's gradients as one CUDA graph: its thousands of small kernels would wait for the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Compute = Callable[[Tensor], tuple[Tensor, ...]]


def captured(compute: Compute, rows: Tensor, use: bool = True) -> Compute:
    """``compute`` as a CUDA graph that is replayed on other ``rows``; ``compute`` itself on a CPU or without ``use``.

    ``rows`` is an example of its argument. What it reads besides stays where it is and may be changed in place. Its
    results are overwritten by the next call.
    """
    if not (use and rows.is_cuda):
        return compute
    static, stream = rows.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute(static)  # what is made once, such as a library's workspace, may not fall into the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # empties the allocator's cache first
        results = compute(static)

    def replay(rows: Tensor) -> tuple[Tensor, ...]:
        static.copy_(rows)
        graph.replay()
        return results

    return replay
