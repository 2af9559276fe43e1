"""Layers of a block as one stage: what the layers give one by one, and when they are one."""

import pytest
import torch
from helpers.block_layers import DEVICE, I, K, N, make_layer, results, tokens
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

import bora_kernels
from bora_kernels.blocks import NormOrigin, gated_mlp, rms_norm, shared_input
from bora_kernels.ops import autograd, calls
from bora_kernels.replay.recording import in_a_stage

pytestmark = pytest.mark.sampled(4)
EPS = 1e-5
SIZES = {"mlp": ((I, K), (I, K), (N, I)), "readers": ((N, K), (2 * N, K), (I, K))}
BORA = ("bora", "bora", "bora")
both = pytest.mark.parametrize("block", SIZES)


@pytest.fixture
def stages(monkeypatch):
    """The stages of several layers that ran, by name."""
    from bora_kernels.blocks import layer_kernels, mlp_kernels

    names = []

    def note(name):
        if not in_a_stage():  # what a first forward plans of its backward is
            names.append(name)

    for module, name in ((layer_kernels, "_forward"), (layer_kernels, "_backward"), (mlp_kernels, "_joined")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, own=own, n=name, **k: (note(n), own(*a, **k))[1])
    return names


@pytest.fixture
def one_by_one(monkeypatch):
    """A context in which no call is joined with others."""

    def enter(function):
        with monkeypatch.context() as patch:
            patch.setattr(calls, "join", lambda *_: None)
            return function()

    return enter


def layers_of(block, kinds=BORA, biases=(False,) * 3, **options):
    options = {"backend": "triton", "dtype": torch.bfloat16} | options
    sizes = zip(SIZES[block], kinds, biases, strict=True)
    return [make_layer(n, k, kind, bias=bias, seed=i, **options) for i, ((n, k), kind, bias) in enumerate(sizes)]


def run(block, x, layers, offset=None):
    """Outputs and all gradients."""
    weight = (1 + 0.1 * torch.randn(K, generator=torch.Generator().manual_seed(8))).to(DEVICE, x.dtype)
    normed, origin = x, None
    if offset is not None:
        normed, origin = rms_norm(x, weight, EPS, offset), NormOrigin(x.detach(), weight, offset, EPS)
    if block == "mlp":
        return results([gated_mlp(normed, *layers, "silu", origin)], x, layers)
    return results(shared_input(normed, layers, origin), x, layers)


def assert_same(found, expected, exact):
    """The same bits; unless ``exact`` gradients within rounding: layers that share sums over x add in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if exact or name.startswith("y"):
            assert torch.equal(found[name], value), name
        else:
            error = (found[name].double() - value.double()).norm() / value.double().norm()
            assert error <= (2**-8 if value.dtype == torch.bfloat16 else 1e-5), (name, error)


@both
@pytest.mark.parametrize("kinds", [BORA, ("dora", "columns", "lora")], ids=["bora", "mixed"])
@pytest.mark.parametrize("offset", [None, 1.0], ids=["x", "norm"])
def test_the_same_as_layers_one_by_one(block, kinds, offset, stages, one_by_one):
    layers, x = layers_of(block, kinds), tokens(torch.bfloat16)
    found = run(block, x, layers, offset)
    assert stages == ["_forward", "_joined" if block == "mlp" else "_backward"]
    assert_same(found, one_by_one(lambda: run(block, x, layers, offset)), exact=block == "mlp")


@both
@pytest.mark.parametrize("shape", [(K,), (7, K), (2, 1, 3, K)], ids=str)
def test_shapes_of_x(block, shape, stages, one_by_one):
    layers, x = layers_of(block), tokens(torch.bfloat16, shape)
    found = run(block, x, layers)
    assert len(stages) == 2 and found["y0"].shape[:-1] == shape[:-1]
    assert_same(found, one_by_one(lambda: run(block, x, layers)), exact=block == "mlp")


@both
def test_x_and_gradients_that_do_not_lie_in_rows(block, stages, one_by_one):
    layers, base = layers_of(block), tokens(torch.bfloat16, (K, 3, 2)).detach()
    dys = [torch.randn(n, 3, 2, device=DEVICE).bfloat16().permute(2, 1, 0) for n, _ in SIZES[block]]

    def step():
        x = base.permute(2, 1, 0).detach().requires_grad_()
        outputs = [gated_mlp(x, *layers, "silu")] if block == "mlp" else shared_input(x, layers)
        given = dys[2:] if block == "mlp" else dys
        adapters = [t for layer in layers for t in layer.adapter]
        made = {f"y{i}": y for i, y in enumerate(outputs)}
        return made | {str(i): g for i, g in enumerate(torch.autograd.grad(outputs, [x, *adapters], given))}

    found = step()
    assert len(stages) == 2
    assert_same(found, one_by_one(step), exact=block == "mlp")


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "dx alone"])
@pytest.mark.parametrize("grad", [True, False], ids=["dx", "no dx"])
def test_biases_and_what_is_needed(trained, grad, stages, one_by_one):
    if not trained and not grad:
        pytest.skip("nothing has a gradient")
    layers, x = layers_of("readers", biases=(True, False, True), trained=trained), tokens(torch.bfloat16, grad=grad)
    layers[2].bias.requires_grad_()
    found = run("readers", x, layers)
    assert len(stages) == 2
    assert_same(found, one_by_one(lambda: run("readers", x, layers)), exact=not (trained and grad))


def test_a_trained_bias(stages):
    layers, x = layers_of("readers", biases=(True,) * 3, dtype=torch.float32), tokens()
    layers[1].bias.requires_grad_()
    outputs = shared_input(x, layers)
    dys = [torch.randn_like(y) for y in outputs]
    (found,) = torch.autograd.grad(outputs, [layers[1].bias], dys)
    torch.testing.assert_close(found, dys[1].sum((0, 1)))


@both
@pytest.mark.parametrize(
    "kinds, options",
    [(("bora", "frozen", "bora"), {}), (BORA, {"dtype": torch.float16}), (BORA, {"backend": "torch"})],
    ids=["a frozen one", "float16", "torch"],
)
def test_layers_that_are_run_one_by_one(block, kinds, options, stages):
    run(block, tokens(options.get("dtype", torch.bfloat16)), layers_of(block, kinds, **options))
    assert "_forward" not in stages and "_backward" not in stages


@both
def test_scales_are_made_once_in_a_scope(block, stages, one_by_one):
    layers, x = layers_of(block), tokens(torch.bfloat16)
    expected = one_by_one(lambda: run(block, x, layers))
    stages.clear()
    with bora_kernels.reuse_scales():
        found = [run(block, x, layers) for _ in range(2)]
        with torch.no_grad():
            layers[0].adapter.magnitude_row.mul_(2.0)
        changed = run(block, x, layers)
    assert len(stages) == 6
    for each in found:
        assert_same(each, expected, exact=block == "mlp")
    assert_same(changed, one_by_one(lambda: run(block, x, layers)), exact=block == "mlp")


@both
def test_checkpointed_and_without_gradients(block, stages, one_by_one):
    layers, x = layers_of(block), tokens(torch.bfloat16)
    call = (lambda x: (gated_mlp(x, *layers, "silu"),)) if block == "mlp" else (lambda x: shared_input(x, layers))
    expected = one_by_one(lambda: results(call(x), x, layers))
    assert_same(results(checkpoint(call, x, use_reentrant=False), x, layers), expected, exact=block == "mlp")
    with torch.no_grad():
        stages.clear()
        for i, y in enumerate(call(x)):
            assert torch.equal(y, expected[f"y{i}"])
    assert stages == ["_forward"]


def test_an_output_that_was_changed_in_place_is_computed_again(stages):
    if not hasattr(torch._C._autograd.SavedTensor, "unpack"):
        pytest.skip("an older torch refuses such outputs by itself")
    layers, x = layers_of("readers", dtype=torch.float32), tokens()
    expected = run("readers", x, layers)
    outputs = shared_input(x, layers)
    with torch.no_grad():
        outputs[1].mul_(3.0)
    autograd._warn_of_changed_output.cache_clear()
    with pytest.warns(UserWarning, match="changed in place"):
        found = results(outputs, x, layers)
    assert stages[-1] == "_forward"
    for name, value in expected.items():
        if not name.startswith("y"):
            torch.testing.assert_close(found[name], value)
