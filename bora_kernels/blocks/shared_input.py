"""Layers that read one x as one function: y_i = x·W'_iᵀ + bias_i, and dx = Σ dx_i.

x, or what it was made from, is kept once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import autograd, overwritten, transforms
from . import compiled, joined, projection
from .norms import NormOrigin
from .projection import Kept, Part, Projection


def shared_input(x: Tensor, layers: Sequence[Projection], origin: NormOrigin | None = None) -> tuple[Tensor, ...]:
    """The outputs [..., N_i] of layers [N_i, K] for x [..., K], without dropout.

    Args:
        origin: what x was made from, where it is a norm's output: kept in the place of x.

    Raises:
        ValueError, TypeError: as ``bora_linear`` does, for one of the layers.
    """
    x = projection.autocast(x)
    parts, tensors = tuple(layer.part() for layer in layers), [t for layer in layers for t in layer.tensors()]
    if not torch.is_grad_enabled():
        return _forward(x, parts, tensors, (False,) * len(tensors), False)[0]
    return _SharedInput.apply(x, parts, *(origin or (None, None, None, None)), *tensors)


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # [..., K]
        parts: tuple[Part, ...],
        origin_x: Tensor | None,  # [..., K]
        origin_weight: Tensor | None,  # [K]
        offset: float | None,
        eps: float | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        requested = ctx.needs_input_grad[_ARGUMENTS:]
        outputs, kept, needs, recipe = _forward(x, parts, tensors, requested, ctx.needs_input_grad[0])
        reads_x = any(any(of_part[1:]) for of_part in needs)
        ctx.save_for_backward(
            x if reads_x and origin_x is None else None,
            *((origin_x, origin_weight) if reads_x else (None, None)),
            *[t for part in kept for t in (part.scales, part.product, part.u)],
            *tensors,
        )
        ctx.parts, ctx.offset, ctx.eps, ctx.recipe = parts, offset, eps, recipe
        ctx.calls, ctx.needs, ctx.requested = [part.call for part in kept], needs, requested
        ctx.saved_outputs = tuple(
            3 + 3 * i + 1 for i, (y, part) in enumerate(zip(outputs, kept, strict=True)) if part.product is y
        )
        ctx.output_is_saved = bool(ctx.saved_outputs)
        if ctx.output_is_saved:
            overwritten.protect()
            ctx.output_versions = tuple(
                autograd.version_of(y) for y, part in zip(outputs, kept, strict=True) if part.product is y
            )
        return outputs

    @staticmethod
    def backward(ctx, *dys: Tensor):
        return (transforms.once_differentiable(_backward) if torch.is_grad_enabled() else _backward)(ctx, *dys)


_ARGUMENTS = 6  # before the layers' tensors


def _forward(
    x: Tensor, parts: tuple[Part, ...], tensors: Sequence[Tensor | None], requested: tuple[bool, ...], needs_dx: bool
) -> tuple[tuple[Tensor, ...], list[Kept], tuple[Any, ...], projection.Recipe | None]:
    """The outputs, what each layer leaves for backward, the gradients it has to produce; and how they are one stage."""
    if compiled.is_traced():
        traced = compiled.forward(_BLOCK, x, parts, tensors, requested, needs_dx)
        needs = projection.needs(parts, requested, needs_dx)
        return tuple([y for y, _ in traced]), [kept for _, kept in traced], needs, None
    own = projection.split(parts, tensors)
    called = projection.prepare(parts, x, own)
    recipe = joined.recipe(x, called, own, parts, requested, needs_dx)
    if recipe is not None:
        made, needs = joined.forward(x, called, own, recipe), recipe.needs
    else:
        needs = projection.needs(parts, requested, needs_dx)
        layers = zip(parts, called, own, needs, strict=True)
        made = [projection.forward(part, call, x, of, need) for part, call, of, need in layers]
    return tuple([y for y, _ in made]), [kept for _, kept in made], needs, recipe


def _backward(ctx, *dys: Tensor) -> tuple[Any, ...]:
    if compiled.is_traced():
        dx, *of_layers = compiled.backward(_BLOCK, ctx, dys)
        return dx, *[None] * (_ARGUMENTS - 1), *of_layers
    x, origin_x, origin_weight, *rest = autograd.saved_tensors(ctx, ctx.saved_outputs, x_is_saved=True)
    origin = None if origin_x is None else NormOrigin(origin_x, origin_weight, ctx.offset, ctx.eps)
    count = len(ctx.parts)
    kept = [Kept(call, *rest[3 * i : 3 * i + 3]) for i, call in enumerate(ctx.calls)]
    own = projection.split(ctx.parts, rest[3 * count :])
    if ctx.recipe is not None:
        found = joined.backward(dys, x, origin, own, kept, ctx.recipe)
        if found is not None:
            dx, gradients = found
            return dx, *[None] * (_ARGUMENTS - 1), *gradients
    x, wanted = x if origin is None else origin.output(), projection.split(ctx.parts, ctx.requested)
    dx, gradients = None, []
    with transforms.without_autocast(x.device if x is not None else dys[0].device):
        for i in range(count):
            dx_i, of_layer = projection.backward(dys[i], x, own[i], ctx.parts[i], kept[i], ctx.needs[i], wanted[i])
            gradients += of_layer
            dx = dx if dx_i is None else dx_i if dx is None else dx.add_(dx_i)
    return dx, *[None] * (_ARGUMENTS - 1), *gradients


def _forward_in_operator(
    x: Tensor, parts: tuple[Part, ...], tensors: Sequence[Any], requested: tuple[bool, ...], needs_dx: bool, activation
) -> compiled.Outputs:
    outputs, kept, *_ = _forward(x, parts, tensors, requested, needs_dx)
    return list(zip(outputs, kept, strict=True))


def _backward_in_operator(saved: compiled.Saved, dys: Sequence[Tensor]) -> Sequence[Tensor | None]:
    parts, own, dy = saved.parts, saved.own(), dys[0]
    x_like = projection.stand_in(dy.shape[:-1] + (parts[0].shape(own[0])[1],), dy.dtype, dy.device)
    saved.calls, saved.needs = (
        projection.prepare(parts, x_like, own),
        projection.needs(parts, saved.requested, saved.needs_dx),
    )
    saved.recipe = joined.recipe(x_like, saved.calls, own, parts, saved.requested, saved.needs_dx)
    dx, *rest = _backward(saved, *dys)
    return dx, *rest[_ARGUMENTS - 1 :]


_BLOCK = compiled.define_block("shared_input", _forward_in_operator, _backward_in_operator)
