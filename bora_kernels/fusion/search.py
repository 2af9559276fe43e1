"""Gated MLPs, found by what they compute: y = down(act(gate(x))⊙up(x)).

Stubs stand for the linear layers: they keep what they are called with and answer with numbers of their own. The module
around them is called, and has to call each once, with its own input, and to hand back the answer of ``down``; what it
calls ``down`` with, and the gradients of that, have to be act(G)⊙U at every scale. No weight is read, so it does not
matter how weights are stored or where. A forward that asks for the sizes or the values of its tensors, or that changes
its module, may compute something else at the next call and is left alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..blocks.gated_mlp import Activation
from .install import is_any_waited_for, plain

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
}
_SCALES = (1.0, 0.05, 8.0, 1e5)  # at the last ones clamps, soft caps and multipliers of tails show themselves
_TOLERANCE = 2e-5  # of float32; activations are written in several ways


class GatedMLP(NamedTuple):
    """Names of a gated MLP's children, and what is between them. One layer may be gate and up."""

    gate: str
    up: str
    down: str
    activation: Activation
    drops: bool  # whether there is a dropout before ``down`` in training mode
    gate_first: bool = True  # where gate and up are one layer: whether gate is the first half of what it gives


def linear_sizes(module: nn.Module | None) -> tuple[int, int] | None:
    """(in_features, out_features) of a module that is or wraps a linear layer."""
    if module is None or hasattr(module, "parameter_name"):  # PEFT's wrapper of a single parameter
        return None
    base = getattr(module, "base_layer", module)
    if isinstance(base, (nn.Embedding, nn.modules.conv._ConvNd)):
        return None
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def gated_mlp(module: nn.Module) -> GatedMLP | str | None:
    """How this module is a gated MLP; or why not, though its layers have the sizes of one; or None."""
    sizes = {name: pair for name, child in module._modules.items() if (pair := linear_sizes(child))}
    reason = None
    if len(sizes) < 2 or linear_sizes(module):
        return None
    for down, (width, _) in sizes.items():
        for gate, up in itertools.combinations_with_replacement([name for name in sizes if name != down], 2):
            if sizes[gate] == sizes[up] and sizes[gate][1] == width * (1 + (gate == up)):
                found = _probe(module, gate, up, down)
                if isinstance(found, GatedMLP):
                    return found
                if sizes[gate][0] != width:  # with one size for all, any module of three layers looks like one
                    reason = reason or found
    return reason


# --- one call with stubs ---------------------------------------------------------------------------------------------


class _Stub(nn.Module):
    """Stands for a linear layer: keeps its inputs, answers with a given tensor. Other attributes are the layer's."""

    def __init__(self, layer: nn.Module, answer: Tensor) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, answer=answer, inputs=[])

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return self.answer

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # read for its dtype
            K, N = linear_sizes(self.layer) or (1, 1)
            return self.answer.new_zeros(()).expand(N, K)
        return getattr(self.__dict__["layer"], name)


class Watched(TorchFunctionMode):
    """Notes whether somebody asks for sizes or values of tensors."""

    asked: str | None = None

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(function, "__self__", None), "__name__", "")
        if name in _QUESTIONS:
            self.asked = name
        return function(*args, **(kwargs or {}))


_QUESTIONS = frozenset(
    "shape size numel nelement dim ndim ndimension __len__ stride is_contiguous storage_offset item tolist numpy "
    "__bool__ __int__ __float__ __index__ __contains__ any all equal allclose data_ptr".split()
)


class _Call(NamedTuple):
    gate: Tensor
    up: Tensor
    hidden: Tensor  # what ``down`` was called with


def _call(
    module: nn.Module, gate: str, up: str, down: str, scale: float, dtype: torch.dtype, training: bool
) -> _Call | str | None:
    """The module's forward with stubs for its linear layers, or what it does otherwise than a gated MLP.

    None where it is no function of one tensor at all, as of an attention.
    """
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    K, _ = linear_sizes(module._modules[gate]) or (1, 1)
    width, N = linear_sizes(module._modules[down]) or (1, 1)

    def draw(size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(1, 3, size, generator=generator) * scale).to(device, dtype)

    x, G, U, answer = draw(K), draw(width, scale).requires_grad_(), draw(width, scale).requires_grad_(), draw(N)
    with torch.enable_grad():
        answers = {gate: G, up: U} if gate != up else {gate: torch.cat((G, U), -1)}
    answers[down] = answer
    stubs = {
        name: _Stub(child, answers[name] if name in answers else draw(size[1]))  # type: ignore[arg-type] # is there
        for name, child in module._modules.items()
        if (size := linear_sizes(child))
    }
    attributes = dict(module.__dict__)
    with _in_place(module, stubs), _mode(module, training), torch.inference_mode(False), torch.enable_grad():
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
        ):
            with Watched() as watched:
                try:
                    y = plain(module, x)
                except Exception:  # whatever a forward may raise that is none of ours
                    return None
        kept = {name: value for name, value in module.__dict__.items() if name not in _OWN}
    if watched.asked:
        return f"its forward asks for its tensors' {watched.asked}"
    if kept.keys() != attributes.keys() - _OWN or any(value is not attributes[name] for name, value in kept.items()):
        return "its forward changes its module"
    if any(stub.inputs for name, stub in stubs.items() if name not in answers):
        return "its forward calls another linear layer"
    if any(len(stubs[name].inputs) != 1 for name in answers):
        return "its forward does not call each of its linear layers once"
    if any(stubs[name].inputs[0] is not x for name in (gate, up)):
        return "its forward does not call gate and up with its own input"
    if y is not answer:
        return "its forward does not return what down returns"
    return _Call(G, U, stubs[down].inputs[0])


_OWN = frozenset(("_modules", "training"))


@contextmanager
def on_the_side(device: torch.device) -> Iterator[None]:
    """A call that has nothing to do with what is going on around it: gradients, autocast, random numbers."""
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        with torch.random.fork_rng(devices):
            yield


def _probe(module: nn.Module, gate: str, up: str, down: str) -> GatedMLP | str | None:
    """Compares what the module calls ``down`` with to each activation, with gate and up in both roles."""
    for name, child in module._modules.items():
        if name not in (gate, up, down) and child is not None and is_any_waited_for(child):
            return f"a hook or another forward waits for the call of {name}"
    candidates = [(act, swapped) for act in ACTIVATIONS for swapped in (False, True)]
    for scale in _SCALES:
        call = _call(module, gate, up, down, scale, torch.float32, training=False)
        if not isinstance(call, _Call):
            return call
        candidates = [c for c in candidates if _is_product(call, *c)]
        if not candidates:
            return "what its forward calls down with is not act(gate)⊙up with act SiLU, GELU or tanh-GELU"
    activation, swapped = candidates[0]
    half = _call(module, gate, up, down, 1.0, torch.bfloat16, training=False)
    if not isinstance(half, _Call):
        return half
    if half.hidden.dtype != torch.bfloat16 or not _is_product(half, activation, swapped, 2e-2):
        return "its forward computes something else in bfloat16"
    call = _call(module, gate, up, down, 1.0, torch.float32, training=True)
    if not isinstance(call, _Call):
        return call
    drops = not _is_product(call, activation, swapped)
    return GatedMLP(*((up, gate) if swapped else (gate, up)), down, activation, drops, gate != up or not swapped)


def _is_product(call: _Call, activation: Activation, swapped: bool, tolerance: float = _TOLERANCE) -> bool:
    """Whether hidden is act(G)⊙U, and its gradients are those."""
    G, U = (call.up, call.gate) if swapped else (call.gate, call.up)
    with torch.inference_mode(False), torch.enable_grad():
        expected = ACTIVATIONS[activation](G) * U
        if not call.hidden.requires_grad or not _close(call.hidden, expected, tolerance):
            return False
        sums = [t.float().sum() for t in (call.hidden, expected)]
        found, wanted = (torch.autograd.grad(s, [G, U], retain_graph=True, allow_unused=True) for s in sums)
    return all(f is not None and _close(f, w, 5 * tolerance) for f, w in zip(found, wanted, strict=True))


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    found, expected = found.detach().float(), expected.detach().float()
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().mean()))


@contextmanager
def _in_place(module: nn.Module, stubs: dict[str, _Stub]) -> Iterator[None]:
    children = dict(module._modules)
    module._modules.update(stubs)
    try:
        yield
    finally:
        module._modules.update(children)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = training
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
