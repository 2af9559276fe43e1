"""Layers of a block on Triton kernels, as one stage: one replay for all of them, and one for their backward.

    readers    y_i of layers that read one x;  backward: x̂ again where x is a norm's output, all gradients, dx = Σ dx_i
    MLP        e, f and y of a gated MLP; h lives inside the stage;  backward: see ``mlp_kernels``

The launches are those of the layers one by one, but for sums over x that the layers share (``reader_kernels``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..contract import Activation, Adapter, flat, unflat
from ..kernels import gated, rms
from ..kernels.add import add
from ..ops import operators, triton_backend
from ..ops.triton_parts import float32_precision, product_precision
from ..replay.stage import compiled_with, stage
from . import mlp_kernels, reader_kernels
from .projection import Made, Member, Norm, Tensors
from .reader_kernels import Layer

_FORWARD, _BACKWARD = 7, 8  # tensors of a layer: weight, adapter, scales and bias, or product and u


def forward(
    x: Tensor,
    layers: Sequence[Tensors],
    members: tuple[Member, ...],
    activation: Activation | None,
    prepared: object,
    is_wide: bool,
) -> list[Made]:
    """Of layers that read x [..., K]; with an activation of gate, up and down of a gated MLP, where down reads h.

    Each of ``layers`` is a weight, an adapter, the scales (None: made here) and the bias.
    """
    with operators.context("triton", x):
        tensors, settings = [t for own in layers for t in own], _settings(layers, prepared, is_wide)
        results = _forward(x, *tensors, members=members, activation=activation, **settings)
    return [Made(*results[start : start + 4]) for start in range(0, len(results), 4)]


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    norm_weight: Tensor | None,
    norm: Norm | None,
    layers: Sequence[Tensors],
    members: tuple[Member, ...],
    prepared: object,
    is_wide: bool,
) -> tuple[Tensor | None, ...]:
    """dx [..., K], and the gradients of each layer's adapter in float32, for dy_i [..., N_i].

    x is what the norm read where there is a ``norm``, None where nothing reads it. Each of ``layers`` is a weight, an
    adapter, its scales, the product and u.
    """
    with operators.context("triton", dys[0]):
        tensors, settings = [t for own in layers for t in own], _settings(layers, prepared, is_wide)
        return _backward(dys[0], x, norm_weight, *dys[1:], *tensors, members=members, norm=norm, **settings)


@stage
def _forward(x, *tensors, members, activation, precision):
    made: list[Made] = []
    for number, (own, member) in enumerate(zip(_split(tensors, _FORWARD), members, strict=True)):
        if activation is not None and number == 2:
            x = gated.gate(made[0].y, made[1].y, activation)
        made.append(_forward_of(x, own, member))
    return tuple([result for each in made for result in each])


@stage
def _backward(dy, x, norm_weight, *tensors, members, norm, precision):
    others = len(members) - 1
    dys, layers = (dy, *tensors[:others]), _split(tensors[others:], _BACKWARD)

    def make_x() -> Tensor | None:
        return flat(x) if norm is None else rms.rms_norm(flat(x), norm_weight, *norm)

    readers = _layers(layers, members)
    if reader_kernels.share_sums(readers, dy.dtype):
        rows, of_dy = [flat(dy) for dy in dys], product_precision(dy.dtype)
        shared_dx, of_layers = reader_kernels.backward(rows, readers, make_x, None, of_dy)
        return unflat(shared_dx, dy.shape[:-1]), *[gradient for own in of_layers for gradient in own]
    x, dx = make_x(), None
    gradients: list[Any] = []
    for dy, own, (options, needs) in zip(dys, layers, members, strict=True):
        weight, *adapter, flat_scales, product, u = own
        own_dx, *rest = triton_backend.backward(
            dy, x, weight, Adapter(*adapter), flat_scales, product, u, None, options, needs
        )
        dx = own_dx if dx is None else dx if own_dx is None else add(dx, own_dx)
        gradients += rest
    return dx, *gradients


@compiled_with(_forward)
def _their_backward(results, x, *tensors, members, activation, precision) -> None:
    """The launches for the gradients that are needed, of layers that read x itself."""
    if not all(any(member.needs) for member in members):
        return
    layers: list[Any] = []
    biases: list[Tensor | None] = []
    for number, (weight, *adapter, scales, bias) in enumerate(_split(tensors, _FORWARD)):
        made = Made(*results[4 * number : 4 * number + 4])
        product = made.y if made.product is None else made.product
        layers += [weight, *adapter, scales if made.scales is None else made.scales, product, made.u]
        biases.append(bias)
    ys = results[::4]
    if activation is None:
        _backward(ys[0], x, None, *ys[1:], *layers, members=members, norm=None, precision=precision)
        return
    of_gate, of_up, _ = biases  # with one the block's backward is that of its layers one by one
    whole = _layers(_split(tuple(layers), _BACKWARD), members)
    if of_gate is None and of_up is None and mlp_kernels.can_run(ys[0], whole):
        mlp_kernels._joined(
            ys[2], x, None, *ys[:2], *layers, members=members, activation=activation, norm=None, precision=precision
        )


def _forward_of(x: Tensor, own: Tensors, member: Member) -> Made:
    weight, *adapter, flat_scales, bias = own
    options, needs = member
    paths = needs.norm_paths(Adapter(*adapter).members, options)
    made = triton_backend.forward(
        x, weight, Adapter(*adapter), flat_scales, bias, None, options,
        products=paths, save_product=needs.sums(Adapter(*adapter).members, paths)[0],
    )  # fmt: skip
    return Made(*made)


def _layers(layers: Sequence[Tensors], members: tuple[Member, ...]) -> list[Layer]:
    """In a backward, each of a weight, an adapter, its scales, the product and u."""
    made = []
    for (weight, *adapter, flat_scales, product, u), (options, needs) in zip(layers, members, strict=True):
        made.append(Layer(weight, Adapter(*adapter), flat_scales, flat(product), u, options, needs))
    return made


def _settings(layers: Sequence[Tensors], prepared: object, is_wide: bool) -> dict[str, Any]:
    """What a stage of several layers is known by besides: how float32 is multiplied, and which scales are given."""
    if prepared is not None:
        prepared = prepared, tuple([own[5] is not None for own in layers])
    return {"precision": float32_precision(is_wide), "prepared": prepared}


def _split(tensors: tuple, size: int) -> list[tuple]:
    return [tensors[start : start + size] for start in range(0, len(tensors), size)]
