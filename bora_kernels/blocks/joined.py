"""Layers of a block as one stage, where all run on Triton kernels, and not as one for each; the bits are the same.

Where something stands in the way (a frozen layer among them, a quantized weight, float16, hooks on saved tensors) they
run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Activation, Adapter, Needs, given
from ..ops import autograd, calls, operators, overwritten
from . import norms, projection
from .projection import Kept, Member, Norm, Part, Tensors

Forward = tuple[list[tuple[Tensor, Kept]], calls.Joined]


def forward(
    x: Tensor,
    called: Sequence[calls.Call | None],
    own: Sequence[Tensors],
    needs: Sequence[Needs],
    activation: Activation | None = None,
) -> Forward | None:
    """What ``projection.forward`` gives for each layer, and what stands for their calls together; or None.

    With an activation they are gate, up and down of a gated MLP.
    """
    together = calls.join(called, lambda: _others(x, len(called), activation is not None))
    if together is None or not operators.is_direct(together):
        return None
    from . import layer_kernels  # Triton is imported only when it is used

    layers: list[Tensors] = []
    members, remembers, sums = [], [], []
    for (*adapter, bias, weight), call, need in zip(own, called, needs, strict=True):
        options, each = call.options, Adapter(*adapter)  # type: ignore[union-attr] # all are joined
        paths = need.norm_paths(each.members, options)
        scales, remember = autograd.find_scales(x, weight, each, options, (weight,), paths)
        layers.append((weight, *adapter, scales, bias))
        members.append(Member(options, need))
        remembers.append(remember)
        sums.append(need.sums(each.members, paths)[0])
    results = []
    made = layer_kernels.forward(as_rows(x), layers, tuple(members), activation, together)
    for number, (y, product, u, scales) in enumerate(made):
        layer, call = layers[number], called[number]
        if scales is None:
            scales = layer[5]
        elif (remember := remembers[number]) is not None:
            remember(scales)
        kept = (y if layer[6] is None else product) if sums[number] else None
        results.append((y, Kept(call, scales, kept, u if needs[number].lora_B else None)))
    return results, together


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    origin: norms.NormOrigin | None,
    own: Sequence[Tensors],
    parts: Sequence[Part],
    kept: Sequence[Kept],
    needs: Sequence[Needs],
    requested: Sequence[Sequence[bool]],
    together: calls.Joined,
) -> tuple[Tensor | None, list[Tensor | None]] | None:
    """dx and what ``projection.backward`` gives for each layer that reads x, or None where they cannot be one stage.

    x or what it was made from is there if anything reads it.
    """
    if not all(map(any, needs)) or not _are_plain(dys) or not operators.is_direct(together):
        return None
    layers: list[Tensors] = []
    for dy, (*adapter, _, weight), (call, scales, product, u), need in zip(dys, own, kept, needs, strict=True):
        members, call = Adapter(*adapter).members, given(call)
        if product is None and need.sums(members, need.norm_paths(members, call.options))[0]:
            return None  # it was changed in place
        if overwritten.is_overwritten(product, dy):
            return None
        layers.append((weight, *adapter, scales, product if product is None else as_rows(product), u))
    read, norm_weight, norm = read_by(x, origin)
    saved = (*dys[1:], read, norm_weight, *[t for layer in layers for t in (*layer[1:], layer[0])])
    prepared = calls.prepare_backward(together, dys[0], saved)
    from . import layer_kernels

    members_ = tuple([Member(given(each.call).options, need) for each, need in zip(kept, needs, strict=True)])
    read, rows = None if read is None else as_rows(read), [as_rows(dy) for dy in dys]
    dx, *rest = layer_kernels.backward(rows, read, norm_weight, norm, layers, members_, prepared)
    gradients: list[Tensor | None] = []
    for number, (dy, tensors, part) in enumerate(zip(dys, own, parts, strict=True)):
        for gradient, t in zip(rest[4 * number : 4 * number + 4], tensors, strict=False):
            gradients.append(gradient if gradient is None or gradient.dtype == t.dtype else gradient.to(t.dtype))
        gradients.append(projection.bias_gradient(dy, tensors[4]) if requested[number][4] else None)
        gradients += [None] * (part.size - 5)
    return dx, gradients


def _others(x: Tensor, count: int, is_mlp: bool) -> list[tuple[str, torch.Size | None]]:
    """What a backward gets after the first dy and before the layers' tensors: names, and shapes that are known."""
    read: list[tuple[str, torch.Size | None]] = [("x", x.shape), ("the norm's weight", None)]
    return [*read, ("e", None), ("f", None)] if is_mlp else [*[("dy", None)] * (count - 1), *read]


def read_by(x: Tensor | None, origin: norms.NormOrigin | None) -> tuple[Tensor | None, Tensor | None, Norm | None]:
    """What a stage reads: x, or what x is the norm of and the norm's weight, offset and eps."""
    if origin is None:
        return x, None, None
    if norms.kernels_for(origin.x, origin.weight) is None:
        return origin.output(), None, None
    weight = origin.weight
    return origin.x, weight if weight.is_contiguous() else weight.contiguous(), (origin.offset, origin.eps)


def as_rows(t: Tensor) -> Tensor:
    """A tensor that is a matrix, or is one as it lies in memory."""
    return t if t.ndim == 2 or t.is_contiguous() else t.contiguous()


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    return all([type(t) is Tensor and not t.is_neg() for t in tensors])
