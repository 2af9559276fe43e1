"""A linear layer as a part of a block: ``Projection``, and its forward and backward as plain functions of tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _private, quantized
from ..contract import Adapter, Needs, Options, given, separate_product
from ..ops import autograd, calls, operators, transforms, validation

# Of a projection: lora_A, lora_B, both magnitudes and bias, None for absent ones, and what the weight is stored as.
Tensors = tuple[Any, ...]
_STORED = 5  # where the latter begins
Norm = tuple[float, float]  # offset and eps of a norm


class Projection(NamedTuple):
    """A linear layer as a function of x: y = x·W'ᵀ + bias, as in ``bora_linear``, without dropout."""

    weight: Tensor | quantized.Quantized  # [N, K], frozen
    bias: Tensor | None = None  # [N]
    adapter: Adapter | None = None  # None: the frozen layer
    options: Options = Options(1.0)
    compute_dtype: torch.dtype | None = None  # what a quantized weight is multiplied in

    def tensors(self) -> Tensors:
        stored = self.weight.tensors if isinstance(self.weight, quantized.Quantized) else (self.weight,)
        return (*(self.adapter or (None, None, None, None)), self.bias, *stored)

    def part(self) -> Part:
        options = None if self.adapter is None else self.options
        if isinstance(self.weight, quantized.Quantized):
            return Part(_STORED + len(self.weight.tensors), options, self.weight.layout)
        return Part(_STORED + 1, options, None)


class Part(NamedTuple):
    """A projection apart from its tensors."""

    size: int  # how many they are
    options: Options | None  # None: the frozen layer
    layout: quantized.Layout | None  # of a quantized weight

    def needs(self, x: bool, requested: Sequence[bool]) -> Needs:
        """Which gradients it has to produce: that of x, and those requested of its tensors."""
        return Needs(x, *requested[:4])

    def shape(self, tensors: Sequence[Any]) -> tuple[int, int]:
        """Of its weight [N, K]."""
        return tensors[_STORED].shape if self.layout is None else self.layout.shape


class Kept(NamedTuple):
    """What the forward of a projection leaves for its backward."""

    call: calls.Call | None
    scales: Tensor | None = None
    product: Tensor | None = None  # before the bias
    u: Tensor | None = None


class Member(NamedTuple):
    """What the launches of a layer depend on besides its tensors."""

    options: Options
    needs: Needs


class Recipe(NamedTuple):
    """What follows from the calls and from the gradients that are asked for, once for all blocks that are alike."""

    together: calls.Joined  # what stands for the calls
    members: tuple[Member, ...]
    paths: tuple[bool, ...]  # whether a layer's backward needs what its norms have left over
    sums: tuple[bool, ...]  # and the product
    sizes: tuple[int, ...]  # of the layers' tensors
    biases: tuple[bool, ...]  # whether their gradients are asked for
    is_wide: bool  # whether anything is float32, for which PyTorch has a setting

    @property
    def needs(self) -> tuple[Needs, ...]:
        return tuple([member.needs for member in self.members])


class Made(NamedTuple):
    """What a layer's forward gives."""

    y: Tensor
    product: Tensor | None  # before the bias, where it is kept apart
    u: Tensor
    scales: Tensor | None  # if they were made


def split(parts: Sequence[Part], of_tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What belongs to each part, of tensors or of something for each of them."""
    ends = [sum(part.size for part in parts[: number + 1]) for number in range(len(parts))]
    return [tuple(of_tensors[end - part.size : end]) for end, part in zip(ends, parts, strict=True)]


def autocast(x: Tensor) -> Tensor:
    """x as ``torch.autocast`` has linear layers see it."""
    dtype = validation.autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def needs(parts: Sequence[Part], requested: Sequence[bool], needs_dx: bool, is_mlp: bool = False) -> tuple[Needs, ...]:
    """The gradients that each layer has to produce, of those that read x, or of gate, up and down of a gated MLP."""
    wanted = split(parts, requested)
    if not is_mlp:
        return tuple([part.needs(needs_dx, of) for part, of in zip(parts, wanted, strict=True)])
    above = needs_dx or any(wanted[0]) or any(wanted[1])  # whether a gradient of h is needed
    of_x = (needs_dx, needs_dx, above)
    return tuple([part.needs(x, of) for part, x, of in zip(parts, of_x, wanted, strict=True)])


def prepare(parts: Sequence[Part], x: Tensor, own: Sequence[Tensors]) -> list[calls.Call | None]:
    """Calls of layers that read x, checked, None for a frozen one; x is as ``autocast`` has it.

    Raises as ``bora_linear`` does.
    """
    adapted = [number for number, part in enumerate(parts) if part.options is not None]
    layers = []
    for number in adapted:
        (lora_A, lora_B, row, col, bias, *stored), layout = own[number], parts[number].layout
        weight = stored[0] if layout is None else quantized.Quantized(layout, tuple(stored))
        layers.append(((weight, lora_A, lora_B, row, col, bias), given(parts[number].options)))
    found: list[calls.Call | None] = [None] * len(parts)
    made = calls.prepare_all(x, layers)
    prepared = any([call.prepared is not None for call in made])
    if prepared and _private.saved_tensors_hooks(True) is not None:
        made = [call._replace(prepared=None) for call in made]  # what hooks hand back may lie in memory otherwise
    for number, call in zip(adapted, made, strict=True):
        found[number] = call
    return found


def as_rows(t: Tensor) -> Tensor:
    """A tensor that is a matrix, or is one as it lies in memory."""
    return t if t.ndim == 2 or t.is_contiguous() else t.contiguous()


@functools.lru_cache(maxsize=64)
def stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape that takes no memory, to look at where there is none."""
    return torch.empty((), dtype=dtype, device=device).expand(shape)


def forward(part: Part, call: calls.Call | None, x: Tensor, tensors: Tensors, needs: Needs) -> tuple[Tensor, Kept]:
    """The output, and what a backward with these needs uses again; ``call`` is what ``prepare`` gave."""
    *members, bias = tensors[:_STORED]
    stored = tensors[_STORED:]
    if call is None:
        with transforms.without_autocast(x.device):
            y = F.linear(x, _dense(part, stored, x, "forward"), None if bias is None else bias.to(x.dtype))
        return y, Kept(None)
    y, product, u, scales, needs_S, _ = autograd.layer_forward(needs, x, Adapter(*members), bias, None, call, stored)
    product = (product if separate_product(x.dtype, bias) else y) if needs_S else None
    return y, Kept(call, scales, product, u if needs.lora_B else None)


def backward(
    dy: Tensor, x: Tensor | None, tensors: Tensors, part: Part, kept: Kept, needs: Needs, requested: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and the gradients of the tensors that are requested. A product that is missing is made again."""
    *members, bias = tensors[:_STORED]
    stored = tensors[_STORED:]
    dx: Tensor | None = None
    gradients: list[Tensor | None] = [None] * 4
    if kept.call is None:
        dx = dy @ _dense(part, stored, dy, "backward") if needs.x else None
    elif any(needs):
        options, adapter = kept.call.options, Adapter(*members)
        needs_S = needs.sums(adapter.members, needs.norm_paths(adapter.members, options))[0]
        saved = (x, *adapter, kept.scales, kept.product, kept.u, None, *stored)
        dx, *gradients = autograd.layer_backward(needs, dy, saved, kept.call, needs_S and options.backend != "dense")
    d_bias = bias_gradient(dy, bias) if requested[4] else None
    return dx, [*gradients, d_bias, *[None] * len(stored)]


def bias_gradient(dy: Tensor, bias: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0).to(bias.dtype)


def no_gradients(part: Part) -> list[Tensor | None]:
    """Those of a layer that nothing is asked of."""
    return [None] * part.size


def _dense(part: Part, stored: Tensors, x: Tensor, caller: str) -> Tensor:
    """A frozen layer's weight in x's dtype."""
    if part.layout is None:
        return stored[0].to(x.dtype)
    backend = "torch" if validation.triton_problem(x.device, x.dtype) else "triton"
    direct = operators.is_direct(None, *stored)
    return quantized.dense(part.layout, stored, x.dtype, backend, caller, direct=direct)
