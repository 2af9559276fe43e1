"""Layers of a block as one stage, where all run on Triton kernels, and not as one for each; the bits are the same.

Where something stands in the way (a frozen layer among them, a quantized weight, float16, hooks on saved tensors) they
run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..contract import Activation, Adapter, given
from ..ops import autograd, calls, operators, overwritten, reuse
from . import norms, projection
from .norms import read_by
from .projection import Kept, Member, Part, Recipe, Tensors, as_rows


def recipe(
    x: Tensor,
    called: Sequence[calls.Call | None],
    own: Sequence[Tensors],
    parts: tuple[Part, ...],
    requested: tuple[bool, ...],
    needs_dx: bool,
    is_mlp: bool = False,
) -> Recipe | None:
    """How to run layers that read x, or gate, up and down of a gated MLP, as one stage; None where they cannot be one.

    ``requested`` says of each of their tensors whether its gradient is asked for.
    """
    together = calls.join(called, lambda: _others(x, len(called), is_mlp))
    if together is None or not operators.is_direct(together):
        return None
    key = requested, needs_dx, is_mlp
    known = together.recipes.get(key)
    if known is None:
        members, paths, sums = [], [], []
        needs = projection.needs(parts, requested, needs_dx, is_mlp)
        for call, tensors, need in zip(called, own, needs, strict=True):
            options, magnitudes = given(call).options, Adapter(*tensors[:4]).members
            members.append(Member(options, need))
            paths.append(need.norm_paths(magnitudes, options))
            sums.append(need.sums(magnitudes, paths[-1])[0])
        biases = tuple([of[4] for of in projection.split(parts, requested)])
        is_wide = any(t.dtype == torch.float32 for t in (x, *[tensors[5] for tensors in own]))
        sizes = tuple([part.size for part in parts])
        known = Recipe(together, tuple(members), tuple(paths), tuple(sums), sizes, biases, is_wide)
        together.recipes[key] = known
    return known


def forward(
    x: Tensor,
    called: Sequence[calls.Call | None],
    own: Sequence[Tensors],
    recipe: Recipe,
    activation: Activation | None = None,
) -> list[tuple[Tensor, Kept]]:
    """What ``projection.forward`` gives for each layer; with an activation they are those of a gated MLP."""
    from . import layer_kernels  # Triton is imported only when it is used

    layers: list[Tensors] = []
    remembers: list[Callable | None] = [None] * len(own)
    may_find = reuse.may_find()
    for number, (*adapter, bias, weight) in enumerate(own):
        scales = None
        if may_find:
            of = weight, Adapter(*adapter), recipe.members[number].options, (weight,), recipe.paths[number]
            scales, remembers[number] = autograd.find_scales(x, *of)
        layers.append((weight, *adapter, scales, bias))
    made = layer_kernels.forward(as_rows(x), layers, recipe.members, activation, recipe.together, recipe.is_wide)
    results = []
    for number, (y, product, u, scales) in enumerate(made):
        layer = layers[number]
        if scales is None:
            scales = layer[5]
        elif (remember := remembers[number]) is not None:
            remember(scales)
        kept = (y if layer[6] is None else product) if recipe.sums[number] else None
        lora_B = recipe.members[number].needs.lora_B
        results.append((y, Kept(called[number], scales, kept, u if lora_B else None)))
    return results


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    origin: norms.NormOrigin | None,
    own: Sequence[Tensors],
    kept: Sequence[Kept],
    recipe: Recipe,
) -> tuple[Tensor | None, list[Tensor | None]] | None:
    """dx and what ``projection.backward`` gives for each layer that reads x, or None where they cannot be one stage.

    x or what it was made from is there if anything reads it.
    """
    if not are_plain(dys) or not operators.is_direct(recipe.together):
        return None
    layers: list[Tensors] = []
    for number, (dy, (*adapter, _, weight), (_, scales, product, u)) in enumerate(zip(dys, own, kept, strict=True)):
        if product is None:
            if recipe.sums[number]:  # it was changed in place
                return None
        elif overwritten.is_overwritten(product, dy):
            return None
        else:
            product = as_rows(product)
        if not any(recipe.members[number].needs):
            return None
        layers.append((weight, *adapter, scales, product, u))
    read, norm_weight, norm = read_by(x, origin)
    saved = (*dys[1:], read, norm_weight, *[t for layer in layers for t in (*layer[1:], layer[0])])
    prepared = calls.prepare_backward(recipe.together, dys[0], saved)
    from . import layer_kernels

    read, rows = None if read is None else as_rows(read), [as_rows(dy) for dy in dys]
    dx, *rest = layer_kernels.backward(
        rows, read, norm_weight, norm, layers, recipe.members, prepared, recipe.is_wide
    )  # fmt: skip
    gradients: list[Tensor | None] = []
    for number, (dy, tensors) in enumerate(zip(dys, own, strict=True)):
        for gradient, t in zip(rest[4 * number : 4 * number + 4], tensors, strict=False):
            gradients.append(gradient if gradient is None or gradient.dtype == t.dtype else gradient.to(t.dtype))
        gradients.append(projection.bias_gradient(dy, tensors[4]) if recipe.biases[number] else None)
        gradients += [None] * (recipe.sizes[number] - 5)
    return dx, gradients


def _others(x: Tensor, count: int, is_mlp: bool) -> list[tuple[str, torch.Size | None]]:
    """What a backward gets after the first dy and before the layers' tensors: names, and shapes that are known."""
    read: list[tuple[str, torch.Size | None]] = [("x", x.shape), ("the norm's weight", None)]
    return [*read, ("e", None), ("f", None)] if is_mlp else [*[("dy", None)] * (count - 1), *read]


def are_plain(tensors: Sequence[Tensor]) -> bool:
    return all([type(t) is Tensor and not t.is_neg() for t in tensors])
