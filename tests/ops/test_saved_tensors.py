"""What happens to tensors between a forward and its backward: other layouts, other devices, freed memory."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.cases import SCALING, Case, backends, require
from torch import nn

from bora_kernels import FusedBoraLinear, bora_linear
from bora_kernels.contract import Options
from bora_kernels.ops import calls, layouts, operators

pytestmark = pytest.mark.sampled(4)
NAMES = ("lora_A", "lora_B", "magnitude_row", "magnitude_col")


def layer(device, backend="triton", bias=True, K=24, N=20, r=3):
    require(backend, torch.float32)
    layer = FusedBoraLinear(K, N, r=r, bias=bias, device=device)
    nn.init.normal_(layer.lora_B)
    layer.backend = backend
    return layer


def step(layer, x, dy, between=lambda y: None):
    y = layer(x)
    between(y)
    return torch.autograd.grad(y, [x, *(getattr(layer, name) for name in NAMES)], dy)


@pytest.fixture
def keys(monkeypatch):
    """What stood for the tensors of each backward."""
    found = []
    backward = operators.backward

    def noting(*arguments, prepared=None):
        found.append(prepared)
        return backward(*arguments, prepared=prepared)

    monkeypatch.setattr(operators, "backward", noting)
    return found


def transposed(tensor):
    return tensor.data.T.contiguous().T


def sliced(tensor):
    wide = torch.zeros(*tensor.shape, 2, device=tensor.device)
    wide[..., 0] = tensor.data
    return wide[..., 0]


def shifted(tensor):
    memory = torch.zeros(tensor.numel() + 1, device=tensor.device)
    return memory[1:].view_as(tensor).copy_(tensor.data)


MOVES = {
    "elsewhere": lambda tensor: tensor.data.clone(),
    "transposed": transposed,
    "sliced": sliced,
    "shifted": shifted,
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", ["x", "weight", *NAMES])
def test_other_data_of_the_same_shape(name, move, device, keys):
    """The right gradients, and with another layout not under the key of what was there; alignments are the stage's."""
    module = layer(device)
    x, dy = torch.randn(7, 24, device=device, requires_grad=True), torch.randn(7, 20, device=device)
    expected = [step(module, x, dy) for _ in range(2)][-1]
    assert keys[0] is not None and keys[0] == keys[1]

    def between(y):
        tensor = x if name == "x" else getattr(module, name)
        if tensor.ndim == 1 and move == "transposed":
            pytest.skip("a vector has no transpose")
        tensor.data = MOVES[move](tensor)

    actual = step(module, x, dy, between)
    torch.testing.assert_close(actual, expected)
    assert (keys[2] == keys[0]) is (move in ("elsewhere", "shifted"))


def test_other_data_of_x_with_batches(device, keys):
    module = layer(device)
    x, dy = torch.randn(3, 5, 24, device=device, requires_grad=True), torch.randn(3, 5, 20, device=device)
    expected = step(module, x, dy)

    def between(y):
        x.data = x.data.permute(2, 0, 1).contiguous().permute(1, 2, 0)

    torch.testing.assert_close(step(module, x, dy, between), expected)
    assert keys[1] != keys[0]


def test_hooks_on_single_saved_tensors(device, keys):
    """Each of what a layer saves, handed back in another layout where it has two axes."""
    module = layer(device)
    x, dy = torch.randn(7, 24, device=device, requires_grad=True), torch.randn(7, 20, device=device)
    expected = step(module, x, dy)
    y = module(x)  # which keeps its graph
    count = len(y.grad_fn._raw_saved_tensors)
    changed = 0
    for index in range(count):
        seen = []

        def between(y, index=index, seen=seen):
            saved = y.grad_fn._raw_saved_tensors[index]
            try:
                saved.register_hooks(lambda t: t.detach().clone(), lambda t: seen.append(t) or MOVES["sliced"](t))
            except RuntimeError:  # nothing is saved there
                assert saved.data is None if hasattr(saved, "data") else True

        actual = step(module, x, dy, between)
        torch.testing.assert_close(actual, expected)
        assert (keys[-1] != keys[0]) == bool(seen)
        changed += bool(seen)
    assert changed >= 8  # x, the factors, the magnitudes, scales, u, the product, the weight


def test_many_layouts_of_dy(device, keys):
    """More than are remembered: none is mistaken for another."""
    module = layer(device)
    x = torch.randn(4, 24, device=device, requires_grad=True)
    values = torch.randn(4, 20, device=device)
    dys = []
    for width in range(20, 20 + calls._MOST_BACKWARDS + 3):
        wide = torch.zeros(4, width, device=device)
        wide[:, :20] = values
        dys.append(wide[:, :20])
    expected = step(module, x, values)
    for dy in (*dys, *dys):
        torch.testing.assert_close(step(module, x, dy), expected)
    known = [key for key in keys if key is not None]
    assert len(set(known)) == calls._MOST_BACKWARDS and None in keys


# ---- refusals ----


@pytest.mark.parametrize("name, index", [("x", 0), ("lora_A", 1), ("magnitude_col", 4), ("scales", 5), ("weight", 9)])
def test_a_tensor_that_moved_to_another_device(name, index, device):
    require("triton", torch.float32)
    case = Case(5, 24, 20, 2)
    inputs, dy = case.inputs(device), case.upstream(device)
    x, tensors = inputs["x"], [inputs[n] for n in ("weight", *NAMES, "bias")]
    prepared = calls.prepare(x, tuple(tensors), Options(SCALING, backend="triton"))[1].prepared
    scales, u = torch.randn(88, device=device), torch.randn(1, 5, 2, device=device)
    saved = [x, *tensors[1:5], scales, dy.clone(), u, None, tensors[0]]
    assert calls.prepare_backward(prepared, dy, tuple(saved)) is not None
    saved[index] = saved[index].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on dy's device {dy.device} as in forward, got meta"):
        calls.prepare_backward(prepared, dy, tuple(saved))


@pytest.mark.parametrize("name", ["x", *NAMES, "weight"])
def test_other_data_of_another_shape(name, device):
    """As sharding engines leave it, `torch.empty(0)`; and a part of what was there."""
    module = layer(device)
    dy = torch.randn(7, 20, device=device)
    for change in (lambda t: torch.empty(0, device=device), lambda t: t.data[: len(t) // 2]):
        x = torch.randn(7, 24, device=device, requires_grad=True)
        step(module, x, dy)
        tensor = x if name == "x" else getattr(module, name)
        kept = tensor.data

        def between(y, tensor=tensor, change=change):
            tensor.data = change(tensor)

        with pytest.raises(ValueError, match=rf"{name} must be .{', '.join(map(str, kept.shape))}. as in forward, got"):
            step(module, x, dy, between)
        tensor.data = kept


FREED = [
    ("x", False),
    ("lora_A", False),
    ("lora_B", True),
    ("magnitude_row", True),
    ("weight", False),
    ("weight", True),
]


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("name, inside", FREED, ids=[f"{name}{'-view' * view}" for name, view in FREED])
def test_freed_memory(name, inside, when, device):
    """Storage of no bytes, as sharding engines leave it: an error that names the tensor, no access to address 0."""
    module = layer(device)
    x, dy = torch.randn(7, 24, device=device, requires_grad=True), torch.randn(7, 20, device=device)
    tensor = x if name == "x" else getattr(module, name)
    if inside:  # a part of a larger buffer: its address is not 0 when that is freed
        flat = torch.empty(tensor.numel() + 100, device=device)
        tensor.data = flat[100:].view_as(tensor).copy_(tensor.data)
    step(module, x, dy)

    def free(y=None):
        tensor.data.untyped_storage().resize_(0)

    if when == "forward":
        free()
    with pytest.raises(ValueError, match=f"{name} must hold .* values, got a tensor whose memory was freed"):
        step(module, x, dy, free if when == "backward" else lambda y: None)


def test_no_tokens_are_no_freed_memory(device):
    x = torch.randn(0, 24, device=device, requires_grad=True)
    gradients = step(layer(device), x, torch.randn(0, 20, device=device))
    assert not any(gradient.any() for gradient in gradients)


# ---- hooks on all saved tensors ----


class Packing:
    """A hook without a module of its own."""

    def __call__(self, tensor):
        return tensor.clone()


PACKS = {
    "method of a type": torch.Tensor.clone,
    "built-in": torch.clone,
    "partial": functools.partial(torch.clone, memory_format=torch.preserve_format),
    "object": Packing(),
    "lambda": lambda tensor: tensor.clone(),
}


@backends
@pytest.mark.parametrize("pack", PACKS)
def test_any_callable_is_a_hook(pack, backend, device):
    case = Case(5, 12, 8, 2)
    require(backend, case.dtype)
    inputs, dy = case.inputs(device), case.upstream(device)
    inputs["x"].requires_grad_()
    results = []
    for hook in (None, PACKS[pack]):
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t) if hook else torch.enable_grad():
            y = bora_linear(**inputs, scaling=SCALING, backend=backend)
        results.append(torch.autograd.grad(y, inputs["x"], dy)[0])
    assert torch.equal(*results)


# ---- layouts, recognized again ----


OTHERS = {
    "shape": lambda t: t[:3],
    "strides": lambda t: t.T.contiguous().T,
    "dtype": lambda t: t.half(),
    "device": lambda t: t.to("meta"),
    "same address, other strides": lambda t: t.as_strided(t.shape, (1, t.shape[0])),
    "same address, other shape": lambda t: t.as_strided((t.shape[0] // 2, t.shape[1] * 2), t.stride()),
    "absent": lambda t: None,
}


@pytest.mark.parametrize("guards", [True, False], ids=["guards", "plain"])
def test_layouts_are_told_apart(guards, device, monkeypatch):
    if not guards:
        monkeypatch.setattr(layouts, "TensorGuards", None)
    tensors = [
        torch.randn(7, 8, device=device)[:6],
        None,
        torch.randn(5, device=device),
        nn.Parameter(torch.ones(2, 3)),
    ]
    known = layouts.Layouts(tensors)
    assert known.hold(tensors) and known.hold([None if t is None else t.detach().clone() for t in tensors])
    assert known.hold([tensors[0], None, tensors[2], tensors[3].detach()])
    for name, change in OTHERS.items():
        assert not known.hold([change(tensors[0]), *tensors[1:]]), name
    assert not known.hold([tensors[0], tensors[2], tensors[2], tensors[3]])
    assert not known.hold(tensors[:3])


def test_most_backwards_are_recognized_by_the_guards(device, monkeypatch):
    """The slower comparison is for what the guards do not know; where PyTorch has none, for all."""
    if layouts.TensorGuards is None:
        pytest.skip("this version of PyTorch has no such guards")
    module = layer(device)
    x, dy = torch.randn(7, 24, device=device, requires_grad=True), torch.randn(7, 20, device=device)
    expected = step(module, x, dy)

    def slow(tensors):
        raise AssertionError("compared in Python")

    monkeypatch.setattr(layouts, "_layouts", slow)
    torch.testing.assert_close(step(module, x, dy), expected)
