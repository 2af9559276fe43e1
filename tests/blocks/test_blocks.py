"""Blocks of layers against the same layers of the reference, one by one: outputs, gradients, and what is kept."""

import pytest
import torch
import torch.nn.functional as F
from helpers.accuracy import assert_accurate, assert_equal
from helpers.block_layers import DEVICE, I, K, N, R, exactly, make_layer, reference, results, tokens

from bora_kernels.blocks import NormOrigin, gated_mlp, rms_norm, shared_input
from bora_kernels.contract import Adapter

EPS = 1e-5
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}


def assert_mlp(kinds, activation="silu", dtype=torch.float32, grad=True, offset=None, backend=None, **options):
    """A gated MLP of layers of these kinds, behind a norm where an offset is given, held to the accuracy rule."""
    sizes = ((I, K), (I, K), (N, I))
    layers = [
        make_layer(n, k, kind, dtype=dtype, seed=i, backend=backend, **options)
        for i, ((n, k), kind) in enumerate(zip(sizes, kinds, strict=True))
    ]
    weight = (1 + 0.1 * torch.randn(K, generator=torch.Generator().manual_seed(8))).to(DEVICE, dtype)
    act = ACTIVATIONS[activation]

    def run(x, layers, block):
        normed, origin = x, None
        if offset is not None:
            w = weight.to(x.dtype)
            if block:
                normed, origin = rms_norm(x, w, EPS, offset), NormOrigin(x.detach(), w, offset, EPS)
            else:
                wide = x.float() if x.dtype != torch.float64 else x
                normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * (offset + w)).to(x.dtype)
        if block:
            return results([gated_mlp(normed, *layers, activation, origin)], x, layers)
        h = act(reference(normed, layers[0])) * reference(normed, layers[1])
        return results([reference(h, layers[2])], x, layers)

    x = tokens(dtype, grad=grad)
    exact = run(x.detach().double().requires_grad_(grad), [exactly(layer) for layer in layers], False)
    assert_accurate(run(x, layers, True), run(x, layers, False), exact, samples=16, floor=2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["bora", "dora", "columns", "lora"])
def test_gated_mlp(kind, activation):
    assert_mlp([kind] * 3, activation)


@pytest.mark.parametrize(
    "kinds",
    [
        ("bora", "frozen", "lora"),
        ("frozen", "dora", "frozen"),
        ("frozen", "frozen", "bora"),
        ("lora", "columns", "dora"),
    ],
)
@pytest.mark.parametrize("grad", [True, False], ids=["dx", "no dx"])
def test_mixed_layers(kinds, grad):
    assert_mlp(kinds, grad=grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_dtypes_and_norms(dtype, offset):
    assert_mlp(["bora"] * 3, "gelu_tanh", dtype, offset=offset, norm_order="col_row")


@pytest.mark.parametrize("options", [{"norm_order": "col_row"}, {"detach_norm": True}], ids=["col_row", "detached"])
def test_options(options):
    assert_mlp(["bora", "dora", "bora"], **options)


@pytest.mark.parametrize("offset", [None, 1.0])
def test_triton(offset):
    pytest.importorskip("triton")
    assert_mlp(["bora", "dora", "lora"], offset=offset, backend="triton")


def assert_shared(kinds, dtype=torch.float32, offset=None, bias=True, backend=None):
    sizes = [N, 2 * N, I, 17][: len(kinds)]
    layers = [
        make_layer(n, K, kind, bias=bias, dtype=dtype, seed=i, backend=backend)
        for i, (n, kind) in enumerate(zip(sizes, kinds, strict=True))
    ]
    weight = (1 + 0.1 * torch.randn(K, generator=torch.Generator().manual_seed(8))).to(DEVICE, dtype)

    def run(x, layers, block):
        if not block:
            normed = x if offset is None else F.rms_norm(x, (K,), offset + weight.to(x.dtype), EPS)
            return results([reference(normed, layer) for layer in layers], x, layers)
        if offset is None:
            return results(shared_input(x, layers), x, layers)
        origin = NormOrigin(x.detach(), weight, offset, EPS)
        return results(shared_input(rms_norm(x, weight, EPS, offset), layers, origin), x, layers)

    x = tokens(dtype)
    exact = run(x.detach().double().requires_grad_(), [exactly(layer) for layer in layers], False)
    assert_accurate(run(x, layers, True), run(x, layers, False), exact, samples=16, floor=2e-6)


@pytest.mark.parametrize("kinds", [["bora"] * 3, ["dora", "lora"], ["columns", "frozen", "bora", "lora"]])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_layers_that_share_their_input(kinds, offset):
    assert_shared(kinds, offset=offset)


@pytest.mark.parametrize("bias", [True, False])
def test_shared_input_in_bfloat16(bias):
    assert_shared(["bora", "dora", "lora"], torch.bfloat16, bias=bias, offset=0.0)


def test_shared_input_on_triton():
    pytest.importorskip("triton")
    assert_shared(["bora", "dora", "lora"], backend="triton")


@pytest.mark.parametrize("block", ["mlp", "shared"])
def test_gradcheck(block):
    layers = [
        make_layer(n, k, "bora", dtype=torch.float64, seed=i) for i, (n, k) in enumerate(((I, K), (I, K), (N, I)))
    ]
    layers = [
        layer._replace(adapter=layer.adapter.map(lambda t: t.detach().double().requires_grad_())) for layer in layers
    ]
    x = tokens(torch.float64, (3, K))
    adapters = [t for layer in layers for t in layer.adapter]

    def call(x, *tensors):
        own = [layer._replace(adapter=Adapter(*tensors[4 * i : 4 * i + 4])) for i, layer in enumerate(layers)]
        return gated_mlp(x, *own, "silu") if block == "mlp" else shared_input(x, own[:2])

    used = adapters if block == "mlp" else adapters[:8]
    assert torch.autograd.gradcheck(lambda x, *t: call(x, *t, *adapters[len(t) :]), (x, *used), fast_mode=True)


def test_same_bits_each_time():
    layers = [make_layer(n, k, "bora", seed=i) for i, (n, k) in enumerate(((I, K), (I, K), (N, I)))]
    x = tokens()
    first, second = (results([gated_mlp(x, *layers, "silu")], x, layers) for _ in range(2))
    assert_equal(first, second)


def test_without_gradients_nothing_is_kept():
    layers = [make_layer(n, k, "bora", seed=i) for i, (n, k) in enumerate(((I, K), (I, K), (N, I)))]
    x = tokens()
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = gated_mlp(x, *layers, "silu")
        shared_input(x, layers[:2])
    assert not kept and not y.requires_grad
    torch.testing.assert_close(y, gated_mlp(x, *layers, "silu").detach())


def test_what_a_block_keeps():
    """x, e, f and y of each token, u of each layer; not h, and x in the place of what a norm made of it."""
    tokens_, wide = 40, {K: 0, I: 0, N: 0, R: 0}
    layers = [make_layer(n, k, "bora", seed=i) for i, (n, k) in enumerate(((I, K), (I, K), (N, I)))]
    x = tokens(shape=(tokens_, K))
    weight = torch.ones(K, device=DEVICE)
    normed = rms_norm(x, weight, EPS)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = gated_mlp(normed, *layers, "silu", NormOrigin(x.detach(), weight, 0.0, EPS))
    for t in kept.values():
        if t.ndim > 1 and t.shape[-2] == tokens_:  # u may be in parts
            wide[t.shape[-1]] += 1
    assert wide == {K: 1, I: 2, N: 1, R: 3}
    assert x.data_ptr() in kept and normed.data_ptr() not in kept and y.data_ptr() in kept


def test_outputs_may_be_changed_in_place():
    layers = [make_layer(n, k, "bora", seed=i) for i, (n, k) in enumerate(((I, K), (I, K), (N, I)))]
    x = tokens()

    def run(change):
        y = gated_mlp(x, *layers, "silu")
        q, k = shared_input(x, layers[:2])
        for t in (y, k):
            change(t)
        return results([y, q, k], x, layers)

    def add(t):
        t += 1

    if not hasattr(torch._C._autograd.SavedTensor, "unpack"):  # an older torch
        with pytest.raises(RuntimeError, match="write out = out . … instead of out .= …"):
            run(add)
        return
    with pytest.warns(UserWarning, match="changed in place before its backward"):
        from bora_kernels.ops.autograd import _warn_of_changed_output

        _warn_of_changed_output.cache_clear()
        changed = run(add)
    plain = run(lambda t: None)
    for name, value in plain.items():
        torch.testing.assert_close(changed[name] - float(name in ("y0", "y2")), value, rtol=1e-4, atol=1e-5)


def test_autocast():
    layers = [make_layer(n, k, "bora", seed=i) for i, (n, k) in enumerate(((I, K), (I, K), (N, I)))]
    x = tokens()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, q = gated_mlp(x, *layers, "silu"), shared_input(x, layers[:2])[0]
        expected = shared_input(x.bfloat16(), layers[:2])[0]
    assert y.dtype == q.dtype == torch.bfloat16 and torch.equal(q, expected)
    found = results([y], x, layers)
    assert found["x"].dtype == torch.float32 and found["0.lora_A"].dtype == torch.float32
    torch.testing.assert_close(y.float(), gated_mlp(x, *layers, "silu"), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_to_one_graph(backend):
    pytest.importorskip("triton")
    torch._dynamo.reset()
    layers = [make_layer(n, k, "bora", seed=i, backend=backend) for i, (n, k) in enumerate(((I, K), (I, K), (N, I)))]
    x, weight = tokens(), torch.ones(K, device=DEVICE)

    def call(x):
        h = rms_norm(x, weight, EPS, 1.0)
        origin = NormOrigin(x.detach(), weight, 1.0, EPS)
        return gated_mlp(h, *layers, "silu", origin), *shared_input(h, layers[:2], origin)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected, found = (results(f(x), x, layers) for f in (call, compiled))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument():
    layers = [make_layer(n, k, "bora", seed=i) for i, (n, k) in enumerate(((I, K), (I, K), (N, I)))]
    with pytest.raises(ValueError, match=f"x must be .*{K}"):
        gated_mlp(tokens(shape=(3, K + 1)), *layers, "silu")
    wrong = layers[2]._replace(adapter=layers[2].adapter._replace(lora_B=torch.randn(N + 1, R, device=DEVICE)))
    with pytest.raises(ValueError, match="lora_B must be"):
        gated_mlp(tokens(shape=(3, K)), *layers[:2], wrong, "silu")
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_tanh, got 'relu'"):
        gated_mlp(tokens(shape=(3, K)), *layers, "relu")


@pytest.mark.parametrize("block", ["mlp", "readers"])
def test_a_penalty_on_gradients_is_refused_and_not_left_out(block):
    x = tokens(torch.float32)
    sizes = ((I, K), (I, K), (N, I)) if block == "mlp" else ((N, K), (I, K))
    layers = [make_layer(n, k, "bora", seed=i) for i, (n, k) in enumerate(sizes)]
    outputs = [gated_mlp(x, *layers, "silu")] if block == "mlp" else shared_input(x, layers)
    loss = sum(y.square().sum() for y in outputs)
    first, last = layers[0].adapter, layers[-1].adapter
    (gradient,) = torch.autograd.grad(loss, first.magnitude_row, create_graph=True)
    for leaf in (x, first.lora_A, first.magnitude_col, last.lora_B):
        with pytest.raises(RuntimeError, match='no second derivative: backend="reference" has'):
            torch.autograd.grad(loss + gradient.square().sum(), leaf, retain_graph=True)
