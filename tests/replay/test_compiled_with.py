"""What a training forward has compiled for its backward: the kernels that this one launches then."""

import pytest
import torch
from helpers.block_layers import I, K, N, make_layer, tokens
from helpers.cases import NAMES, require

pytest.importorskip("triton")

from bora_kernels import replay_disabled
from bora_kernels.blocks import NormOrigin, gated_mlp, layer_kernels, rms_norm, shared_input
from bora_kernels.ops import triton_backend
from bora_kernels.replay import compiling
from bora_kernels.replay.recording import planning

EPS = 1e-5
SIZES = ((I, K), (I, K), (N, I))  # of gate, up and down


@pytest.fixture(autouse=True)
def any_device(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


class Watched:
    """The calls of a stage, whose launches do not happen."""

    def __init__(self, monkeypatch, module, name):
        self.calls, own = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *tensors, **options: self._call(own, tensors, options))

    def _call(self, own, tensors, options):
        results = own(*tensors, **options)
        options.pop("prepared", None)
        self.calls.append((results, tensors, options))
        return results

    def ahead(self, plan):
        """What is launched by what was planned for the backward of the only call."""
        ((results, tensors, options),) = self.calls
        return launched(lambda: plan(results, *tensors, **options))


def launched(function):
    """The variants of kernels that are planned."""
    planned = []
    with planning(planned), replay_disabled():
        function()
    return {compiling._variant(launch) for launch in planned}


def names(variants):
    return {variant[1].fn.__name__ for variant in variants}


def step(call, x, layers, backward=True):
    """What a forward launches, and what its backward does."""
    made = []
    forward = launched(lambda: made.append(call(x)))
    if not backward:
        return forward, set()
    outputs = made[0] if isinstance(made[0], tuple) else made
    inputs = [x, *[t for layer in layers if layer.adapter for t in layer.adapter if t is not None]]
    dys = [torch.empty_like(y) for y in outputs]
    with torch.autograd.set_multithreading_enabled(False):
        return forward, launched(lambda: torch.autograd.grad(outputs, inputs, dys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("kind", ["bora", "dora", "columns", "detached"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_layer(kind, dtype, bias, monkeypatch):
    require("triton", dtype)
    detached = kind == "detached"
    layer = make_layer(
        N, K, "bora" if detached else kind, bias=bias, backend="triton", dtype=dtype, detach_norm=detached
    )
    watched = Watched(monkeypatch, triton_backend, "_forward")
    _, backward = step(lambda x: shared_input(x, (layer,)), tokens(dtype), [layer])
    assert backward and watched.ahead(triton_backend._its_backward) == backward


def test_nothing_for_a_forward_without_gradients(monkeypatch):
    layer, watched = make_layer(N, K, "bora", backend="triton"), Watched(monkeypatch, triton_backend, "_forward")
    with torch.no_grad():
        forward, _ = step(lambda x: shared_input(x, (layer,)), tokens(), [layer], backward=False)
    assert forward and not watched.ahead(triton_backend._its_backward)


@pytest.mark.parametrize("block", ["mlp", "readers"])
@pytest.mark.parametrize("kinds", [("bora",) * 3, ("dora", "columns", "lora")], ids=["bora", "mixed"])
def test_a_block(block, kinds, monkeypatch):
    sizes = SIZES if block == "mlp" else ((N, K), (2 * N, K), (I, K))
    layers = [
        make_layer(*size, kind, backend="triton", dtype=torch.bfloat16) for size, kind in zip(sizes, kinds, strict=True)
    ]
    weight, watched = (
        torch.ones(K, dtype=torch.bfloat16).to(tokens().device),
        Watched(monkeypatch, layer_kernels, "_forward"),
    )

    def call(x):
        normed, origin = rms_norm(x, weight, EPS, 1.0), NormOrigin(x.detach(), weight, 1.0, EPS)
        return gated_mlp(normed, *layers, "silu", origin) if block == "mlp" else shared_input(normed, layers, origin)

    _, backward = step(call, tokens(torch.bfloat16), layers)
    ahead = watched.ahead(layer_kernels._their_backward)
    assert ahead and ahead <= backward
    assert names(backward - ahead) <= {"_rms_norm_kernel", "_rms_norm_backward_kernel"}
    assert ("_gate_sums_kernel" in names(ahead)) == (block == "mlp")


def test_nothing_for_an_mlp_whose_layers_run_one_by_one(monkeypatch):
    layers = [
        make_layer(*size, "bora", backend="triton", bias=bias)
        for size, bias in zip(SIZES, (False, True, False), strict=True)
    ]
    watched = Watched(monkeypatch, layer_kernels, "_forward")
    forward, _ = step(lambda x: gated_mlp(x, *layers, "silu"), tokens(), layers, backward=False)
    assert "_gate_kernel" in names(forward) and not watched.ahead(layer_kernels._their_backward)
