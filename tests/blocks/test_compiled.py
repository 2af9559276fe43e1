"""Blocks under torch.compile: operators that give the bits of eager mode and keep what it keeps."""

import shutil

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from helpers.accuracy import assert_equal
from helpers.block_layers import DEVICE, I, K, make_layer, results, tokens
from helpers.kept import kept_bytes, partitioned
from helpers.quantized_layers import quantized_linear
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bora_kernels import quantized, reuse_scales
from bora_kernels.blocks import NormOrigin, gated_mlp, norms, rms_norm, shared_input

pytestmark = pytest.mark.sampled(4)
EPS = 1e-5
SIZES = ((I, K), (I, K), (28, I), (20, K), (32, K))  # whole fours, between which scales hold nothing
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
CASES = {
    "three kinds": ({"kinds": ("bora", "dora", "lora")}, {}),
    "biases": ({"biases": (True, True, True)}, {}),
    "frozen": ({"kinds": ("frozen", "bora", "frozen")}, {}),
    "columns first": ({"kinds": ("bora", "columns", "bora"), "norm_order": "col_row"}, {"activation": "gelu_tanh"}),
    "detached": ({"detach_norm": True}, {"offset": 0.0}),
    "no origin": ({}, {"origin": False}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),
    "float16": ({"dtype": torch.float16, "biases": (False, True, True)}, {}),
}
TRITON = ("three kinds", "biases", "float16") if DEVICE == "cuda" else ("float16",)  # the interpreter takes seconds
cases = pytest.mark.parametrize(
    "case, backend", [*[(case, "torch") for case in CASES], *[(case, "triton") for case in TRITON]]
)


@pytest.fixture(autouse=True)
def needs(request, monkeypatch):
    if "triton" in request.node.name:
        pytest.importorskip("triton")
    # a compiled norm is PyTorch's, whose last bits and what it keeps are not those of the kernel that a GPU has for it
    monkeypatch.setattr(norms, "kernels_for", lambda *tensors: None)
    torch._dynamo.reset()


def make_layers(kinds=("bora",) * 3, biases=(False,) * 3, **options):
    """Gate, up and down, and two layers beside them."""
    every = zip(SIZES, (*kinds, *kinds[:2]), (*biases, *biases[:2]), strict=True)
    return [make_layer(n, k, kind, bias, seed=i, **options) for i, ((n, k), kind, bias) in enumerate(every)]


def block(layers, *, origin=True, activation="silu", offset=1.0):
    """A gated MLP, and layers that read what it reads, behind a norm."""
    weight = 1 + 0.1 * torch.randn(K, generator=torch.Generator().manual_seed(8)).to(DEVICE)

    def call(x):
        w = weight.to(x.dtype)
        normed = rms_norm(x, w, EPS, offset)
        made_from = NormOrigin(x.detach(), w, offset, EPS) if origin else None
        return gated_mlp(normed, *layers[:3], activation, made_from), *shared_input(normed, layers[3:], made_from)

    return call


def make(case, backend):
    of_layers, of_block = CASES[case]
    layers = make_layers(backend=backend, **of_layers)
    return block(layers, **of_block), layers, of_layers.get("dtype", torch.float32)


def assert_eager(call, x, layers, compiled=None):
    compiled = compiled or torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_equal(results(compiled(x), x, layers), results(call(x), x, layers))


class Recorder(TorchDispatchMode):
    """Notes every call of the blocks' operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "bora_kernels":
            self.calls.append((operator, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        return operator(*args, **(kwargs or {}))

    def compiled(self, call):
        def through(graph, _):
            def run(*args):
                with self:
                    return graph(*args)

            return make_boxed_func(run)

        return torch.compile(call, backend=aot_autograd(fw_compiler=through), fullgraph=True)


@cases
def test_the_bits_of_eager_mode(case, backend):
    call, layers, dtype = make(case, backend)
    assert_eager(call, tokens(dtype), layers)


@pytest.mark.parametrize("case", ["three kinds", "detached", "float16"])
@backends
def test_operators(case, backend):
    if backend == "triton" and case not in TRITON:
        pytest.skip("one case of the interpreter's, which takes seconds")
    call, layers, dtype = make(case, backend)
    recorder = Recorder()
    results(recorder.compiled(call)(x := tokens(dtype)), x, layers)
    names = ["gated_mlp", "gated_mlp_backward", "shared_input", "shared_input_backward"]
    assert sorted(operator.__name__ for operator, _ in recorder.calls) == [f"{name}.default" for name in names]
    for operator, arguments in recorder.calls:
        torch.library.opcheck(operator, arguments)


@cases
def test_no_more_is_kept(case, backend):
    call, layers, dtype = make(case, backend)
    x, known = tokens(dtype, shape=(20, K)), [t for layer in layers for t in layer.tensors() if t is not None]
    eager, parted = (kept_bytes(lambda f=f: f(x), (x, *known)) for f in (call, partitioned(call)))
    assert parted <= eager


@backends
def test_any_batch(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter takes seconds, and dispatching knows no backend")
    layers = make_layers(backend=backend)
    call, counter = block(layers), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for shape in ((2, 3), (2, 5), (4, 7), (3, 4), (6, 2)):
        assert_eager(call, tokens(shape=(*shape, K)), layers, compiled)
    assert counter.frame_count <= 3  # one for the first, one for each dimension that varies


def test_scalings_that_vary():
    """What changes between calls the compiler takes for a variable."""
    layers, holder = make_layers(), torch.nn.Module()
    x = tokens()

    def call(x):
        changed = [each._replace(options=each.options._replace(scaling=holder.scaling)) for each in layers]
        return gated_mlp(x, *changed[:3], "silu"), *shared_input(x, changed[3:])

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for scaling in (0.5, 0.25, 2.0, 3.0):
        holder.scaling = scaling
        assert_eager(call, x, layers, compiled)


@backends
def test_autocast(backend):
    layers = make_layers(backend=backend)
    call, x = block(layers), tokens()

    def cast(x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return call(x)

    assert_eager(cast, x, layers)


@backends
def test_frozen_tokens_and_no_gradients(backend):
    layers = make_layers(backend=backend)
    call, x = block(layers), tokens(grad=False)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_eager(call, x, layers, compiled)
    with torch.no_grad():
        assert_equal(compiled(x), call(x))


@pytest.mark.parametrize("kind", ["nf4-nested", "torchao-float8"])
def test_quantized_weights(kind):
    layers = make_layers(dtype=torch.bfloat16)
    for i in (0, 2):
        base = quantized_linear(kind, layers[i].weight)
        layers[i] = layers[i]._replace(weight=quantized.read(base), compute_dtype=torch.bfloat16)
    assert_eager(block(layers), tokens(torch.bfloat16), layers)


@backends
def test_compiled_autograd_of_an_eager_forward(backend):
    layers = make_layers(backend=backend)
    call, x = block(layers), tokens()
    expected = results(call(x), x, layers)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        assert_equal(results(call(x), x, layers), expected)


def test_norms_are_computed_in_every_call():
    """Also in a scope of reuse, where a change through ``.data`` would not be seen."""
    layers = make_layers()
    call, x = block(layers), tokens()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with reuse_scales():
        compiled(x)
        for layer in layers:
            layer.adapter.lora_B.data.mul_(3.0)
        found = results(compiled(x), x, layers)
    assert_equal(found, results(call(x), x, layers))


@pytest.mark.skipif(shutil.which("cc") is None, reason="inductor needs a C compiler")
@pytest.mark.slow
def test_inductor(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layers = make_layers(biases=(True, False, True))
    call, x = block(layers), tokens()
    found, expected = (results(f(x), x, layers) for f in (torch.compile(call, fullgraph=True), call))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)
