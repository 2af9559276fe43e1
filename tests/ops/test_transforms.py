"""Tensors that mean more than their memory, and transforms: right, or refused with a sentence that says the way out."""

import pytest
import torch
from helpers.accuracy import assert_equal
from helpers.cases import Case, backends, require, variants
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from bora_kernels import FusedBoraLinear, FusedDoraLinear, bora_linear
from bora_kernels.functional import bora_conv, bora_embedding

pytestmark = pytest.mark.sampled(4)
SMALL = {"M": 5, "N": 20, "K": 24, "R": 2}
FUSED = ("torch", "triton")


def make_layer(backend, device, cls=FusedBoraLinear, dtype=torch.float32, **options):
    """A layer after some training, from 24 to 20 features."""
    layer = cls(24, 20, r=2, device=device, dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    layer.backend = backend
    return layer


def gradients(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)


# ---- views with the other sign ----


@backends
def test_the_sign_of_a_conjugates_imaginary_part_counts(backend, device):
    """``z.conj().imag`` is z.imag in memory and stands for −z.imag: of x, dy, and each tensor of the layer."""
    require(backend, torch.float32)
    layer = make_layer(backend, device)
    x, dy = (torch.randn(3, 5, n, dtype=torch.complex64, device=device).conj().imag for n in (24, 20))
    assert x.is_neg() and dy.is_neg()
    for given in ((x, dy), (x.clone(), dy), (x, dy.clone()), (x, dy)):
        for actual, expected in zip(gradients(layer, *given), gradients(layer, x.clone(), dy.clone()), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@backends
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "magnitude_row", "magnitude_col", "bias"])
def test_the_sign_of_a_parameter_counts(backend, name, device):
    require(backend, torch.float32)
    inputs = Case(**SMALL).inputs(device)
    view = torch.complex(torch.zeros_like(inputs[name]), -inputs[name]).conj().imag
    assert view.is_neg() and torch.equal(view, inputs[name])
    expected = bora_linear(**inputs, scaling=0.5, backend=backend)
    torch.testing.assert_close(bora_linear(**{**inputs, name: view}, scaling=0.5, backend=backend), expected)


# ---- transforms of torch.func, forward mode ----


def loss_of(layer):
    """The loss as a function of the trained parameters and one token."""
    return lambda parameters, token: functional_call(layer, parameters, (token,)).square().sum()


def test_transforms_of_the_reference_are_those_of_the_dense_layer(device):
    layer = make_layer("reference", device, dtype=torch.float64, adapter_dtype=torch.float64)
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    x = torch.randn(4, 24, device=device, dtype=torch.float64)
    each = vmap(grad(loss_of(layer)), in_dims=(None, 0))(trained, x)  # a gradient for each token
    for index in range(4):
        loss = layer(x[index]).square().sum()
        alone = torch.autograd.grad(loss, [layer.get_parameter(name) for name in trained])
        for name, expected in zip(trained, alone, strict=True):
            torch.testing.assert_close(each[name][index], expected)
    dense = layer.effective_weight()
    torch.testing.assert_close(jacrev(layer)(x[0]), dense)
    value, tangent = jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, layer(x))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ dense.T)
    several = {name: torch.stack([p, 2 * p, -p]) for name, p in trained.items()}  # an ensemble of adapters
    outputs = vmap(lambda parameters: functional_call(layer, parameters, (x,)))(several)
    for index in range(3):
        one = functional_call(layer, {name: p[index] for name, p in several.items()}, (x,))
        torch.testing.assert_close(outputs[index], one)


TRANSFORMS = {
    "grad": lambda layer, x: grad(lambda t: layer(t).sum())(x),
    "grad-of-parameters": lambda layer, x: grad(loss_of(layer))({"lora_A": layer.lora_A.detach()}, x),
    "vmap": lambda layer, x: vmap(layer)(x),
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "jvp": lambda layer, x: jvp(layer, (x,), (x,)),
}


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_fused_backends_refuse_transforms(backend, name, device):
    require(backend, torch.float32)
    with pytest.raises(ValueError, match=f'backend must be "reference" in transforms of torch.func .*got "{backend}"'):
        TRANSFORMS[name](make_layer(backend, device), torch.randn(5, 24, device=device))


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", ["x", "lora_A"])
def test_forward_mode(backend, dtype, mode, name, device):
    require(backend, dtype)
    inputs = Case(**SMALL, dtype=dtype).inputs(device)
    tangent = torch.randn_like(inputs[name])
    with mode(), forward_ad.dual_level():
        plain = bora_linear(**inputs, scaling=0.5, backend=backend)  # nothing to differentiate: as ever
        dual = {**inputs, name: forward_ad.make_dual(inputs[name], tangent)}
        if backend != "reference":
            with pytest.raises(ValueError, match='backend must be "reference" for derivatives in forward mode, got'):
                bora_linear(**dual, scaling=0.5, backend=backend)
            return
        value, made = forward_ad.unpack_dual(bora_linear(**dual, scaling=0.5, backend=backend))
    assert torch.equal(value, plain)
    wide = {n: None if t is None else t.double() for n, t in inputs.items()}
    layer = lambda t: bora_linear(**{**wide, name: t}, scaling=0.5, backend="reference")  # noqa: E731
    _, exact = torch.autograd.functional.jvp(layer, wide[name], tangent.double())
    torch.testing.assert_close(made.double(), exact, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-4)


def test_embeddings_and_convolutions_refuse_transforms():
    weight, A, B, row, col = torch.randn(6, 4), torch.randn(2, 6), torch.randn(4, 2), torch.ones(4), torch.ones(6)
    with pytest.raises(ValueError, match="must be linear in transforms of torch.func"):
        vmap(lambda ids: bora_embedding(ids, weight, A, B, row, col, scaling=1.0))(torch.arange(3))
    conv = lambda x: bora_conv(  # noqa: E731
        x, weight.T[..., None], A[..., None], B, row, col, None, nn.functional.conv1d, scaling=1.0
    )
    with pytest.raises(ValueError, match="must be linear in transforms of torch.func"):
        jvp(conv, (torch.randn(2, 6, 3),), (torch.randn(2, 6, 3),))


# ---- meta tensors ----


@pytest.mark.parametrize("backend", [None, *FUSED, "reference"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "dropout": 0.3}], ids=["plain", "dropout"])
@pytest.mark.parametrize("cls", [FusedBoraLinear, FusedDoraLinear])
def test_meta_tensors_have_the_shapes_of_others(backend, options, cls):
    if backend == "triton":
        require(backend, torch.bfloat16)
    layer = make_layer(backend, "cpu", cls, torch.bfloat16, **options).to("meta")
    x = torch.empty(3, 4, 24, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y = layer(x)
    assert y.is_meta and y.shape == (3, 4, 20) and y.dtype == torch.bfloat16
    y.sum().backward()
    for tensor in (x, *(p for p in layer.parameters() if p.requires_grad)):
        assert tensor.grad.is_meta and tensor.grad.shape == tensor.shape and tensor.grad.dtype == tensor.dtype
    with torch.no_grad():
        assert layer(x).shape == y.shape


def test_meta_tensors_in_embeddings_and_convolutions():
    one = lambda *shape: torch.empty(*shape, device="meta", requires_grad=True)  # noqa: E731
    weight = torch.empty(6, 4, device="meta")
    ids = torch.empty(2, 3, dtype=torch.long, device="meta")
    assert bora_embedding(ids, weight, one(2, 6), one(4, 2), one(4), one(6), scaling=1.0).shape == (2, 3, 4)
    factors = one(2, 6, 1), one(4, 2), one(4), one(6)
    y = bora_conv(one(3, 6, 7), weight.T[..., None], *factors, None, nn.functional.conv1d, scaling=1.0)
    y.sum().backward()
    assert y.shape == (3, 4, 7) and all(t.grad.shape == t.shape for t in factors)


# ---- nested tensors ----


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_jagged_tensors_are_taken_row_by_row(backend, device):
    require(backend, torch.float32)
    layer = make_layer(backend, device)
    rows = [torch.randn(length, 24, device=device) for length in (3, 1, 6)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    y = layer(nested)
    assert y.is_nested and y.shape[:2] == nested.shape[:2]
    assert (y + nested @ torch.zeros(24, 20, device=device)).is_nested  # the same ragged dimension
    for part, row in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(part, layer(row))
    y.values().square().sum().backward()
    actual = [nested.grad.values(), *(p.grad for p in layer.parameters() if p.requires_grad)]
    packed = torch.cat(rows)
    for one, expected in zip(actual, gradients(layer, packed, 2 * layer(packed).detach())[1:], strict=True):
        torch.testing.assert_close(one, expected)


def test_other_nested_tensors_are_refused():
    layer = make_layer("torch", "cpu")
    with pytest.raises(ValueError, match=r"x must be \[batch, ragged, in_features\] with .*strided"):
        layer(torch.nested.nested_tensor([torch.randn(2, 24), torch.randn(3, 24)], layout=torch.strided))
    other = torch.nested.nested_tensor([torch.randn(24, 2), torch.randn(24, 3)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ValueError, match="x must be .* got another ragged dimension"):
        layer(torch.nested.nested_tensor([torch.randn(2, 24), torch.randn(3, 24)], layout=torch.jagged).transpose(1, 2))
    assert layer(other).shape[2] == 20


# ---- floating-point operations ----


def product_in_place(out, a, b, **_):
    """What PyTorch's own formulas leave out."""
    return 2 * a[0] * a[1] * b[1]


@variants
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("detach_norm", [False, True])
def test_counted_operations_are_those_of_pytorchs_own(member, order, backend, detach_norm, device, monkeypatch):
    """What the operators stand for is what the "torch" backend's products add up to, on either backend."""
    require(backend, torch.float32)
    case = Case(7, 20, 24, 3, member=member, order=order)

    def count(backend):
        inputs = {n: None if t is None else t.requires_grad_(n != "weight") for n, t in case.inputs(device).items()}
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_in_place}) as counter:
            y = bora_linear(**inputs, scaling=0.5, norm_order=order, detach_norm=detach_norm, backend=backend)
            forward = counter.get_total_flops()
            y.backward(case.upstream(device))
        return forward, counter.get_total_flops() - forward

    operators = count(backend)
    monkeypatch.setattr(
        "bora_kernels.ops.operators.is_direct", lambda *_: True
    )  # the body, whose products PyTorch counts
    monkeypatch.setattr("bora_kernels.ops.adapted_weight._cancels", lambda *_: False)  # not one of the layer's products
    monkeypatch.setattr("bora_kernels.ops.torch_backend._reads_word", lambda _: True)  # of the equations, not of V
    assert operators == count("torch")


def test_counters_that_were_open_before_the_first_layer_count_it(device):
    with FlopCounterMode(display=False) as outer, FlopCounterMode(display=False) as inner, torch.no_grad():
        make_layer("torch", device)(torch.randn(5, 24, device=device))
    products = 2 * 5 * 20 * 24 + 2 * 5 * 2 * (20 + 24) + 2 * 20 * 24 * 2
    assert inner.get_total_flops() == outer.get_total_flops() == products


# ---- outputs that are changed in place ----


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_an_output_may_be_changed_in_place(backend, dtype, bias, device):
    """As of a plain layer: ``out.add_(residual)`` of a shared expert, say."""
    require(backend, dtype)
    layer = make_layer(backend, device, dtype=dtype, bias=bias)
    x, residual = torch.randn(2, 3, 24, device=device).to(dtype), torch.randn(2, 3, 20, device=device).to(dtype)
    dy = torch.randn_like(residual)

    class InPlace(nn.Module):
        def __init__(self, layer, change):
            super().__init__()
            self.layer, self.change = layer, change

        def forward(self, x):
            return self.change(self.layer(x))

    if not bias and dtype != torch.float16 and not hasattr(torch._C._autograd.SavedTensor, "unpack"):
        with pytest.raises(RuntimeError, match="write out = out . … instead of out .= …"):
            gradients(InPlace(layer, lambda y: y.add_(residual)), x, dy)
        return
    actual = gradients(InPlace(layer, lambda y: y.add_(residual).mul_(3)), x, dy)
    expected = gradients(InPlace(layer, lambda y: (y + residual) * 3), x, dy)
    assert_equal(actual, expected)


def test_other_changes_in_place_are_refused_as_ever(device):
    layer = make_layer("torch", device, bias=False)
    y = layer(torch.randn(5, 24, device=device)).add_(1)
    with torch.no_grad():
        layer.lora_A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|changed in place"):
        y.sum().backward()
