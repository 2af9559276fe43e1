"""The most that a backward of a gated MLP holds at once, beside what its forward kept: tensors of h's size."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bora_kernels.blocks import Projection, gated_mlp
from bora_kernels.contract import Adapter, Options

M, K, I = 160, 36, 256
HIDDEN = M * I * 4  # bytes of e, f, h


def layer(n, k, backend, bias=False):
    adapter = Adapter(torch.randn(2, k), torch.randn(n, 2), 1 + torch.rand(n), 1 + torch.rand(k))
    adapter = adapter.map(lambda t: t.requires_grad_())
    return Projection(torch.randn(n, k), torch.randn(n) if bias else None, adapter, Options(0.5, backend=backend))


def peak(function):
    """Bytes on the CPU, over what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "backend, bias, most",
    [
        ("triton", False, 2),  # dh, whose place de takes, and df
        ("triton", True, 3),  # and df as up's weight meets it
        ("torch", False, 3),
    ],
    ids=["one pass", "layers one by one", "torch"],
)
def test_de_takes_the_place_of_dh(backend, bias, most):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("counts what the interpreter takes on a CPU")
    layers = layer(I, K, backend, bias), layer(I, K, backend), layer(K, I, backend)
    x = torch.randn(M, K, requires_grad=True)
    y, dy = gated_mlp(x, *layers, "silu"), torch.randn(M, K)
    inputs = [x, *[t for each in layers for t in each.adapter]]
    gc.collect()  # the interpreter's cycles, which hold h
    assert most - 0.5 < peak(lambda: torch.autograd.grad(y, inputs, dy)) / HIDDEN < most + 0.6
