"""A gated MLP as one function: y = down(h), h = act(e)⊙f, e = gate(x), f = up(x).

forward   e, f, h, y by the layers' own equations, (1) and (2) of ``ops.torch_backend``
keep      x (or what it was made from), e, f, y, the layers' u and scales; not h
backward  h again; dh and down's gradients from dy and h
          de = dh⊙f⊙act'(e)        df = dh⊙act(e)
          gate's and up's gradients from de, df and x;  dx = dx_gate + dx_up

On Triton e, f and dh are read once for all that is made of them, where ``mlp_kernels`` takes the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Activation, Adapter, Needs, flat, given
from ..ops import autograd, calls, operators, transforms
from . import compiled, joined, projection
from .norms import NormOrigin
from .projection import Kept, Part, Projection

# act(e), and dh⊙act'(e)
_ACTIVATIONS: dict[Activation, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, lambda dh, e: torch.ops.aten.silu_backward(dh, e)),
    "gelu": (F.gelu, lambda dh, e: torch.ops.aten.gelu_backward(dh, e)),
    "gelu_tanh": (
        lambda e: F.gelu(e, approximate="tanh"),
        lambda dh, e: torch.ops.aten.gelu_backward(dh, e, approximate="tanh"),
    ),
}


def gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: Activation,
    origin: NormOrigin | None = None,
) -> Tensor:
    """y [..., N] of x [..., K], for gate and up [I, K] and down [N, I], without dropout.

    Args:
        activation: "silu", "gelu", or "gelu_tanh", its approximation by tanh.
        origin: what x was made from, where it is a norm's output: kept in the place of x.

    Raises:
        ValueError, TypeError: as ``bora_linear`` does, for one of the layers.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    x = projection.autocast(x)
    layers = (gate, up, down)
    parts, tensors = tuple(layer.part() for layer in layers), [t for layer in layers for t in layer.tensors()]
    if not torch.is_grad_enabled():
        return _forward(x, activation, parts, tensors, (False,) * len(tensors), False)[0]
    return _GatedMLP.apply(x, activation, parts, *(origin or (None, None, None, None)), *tensors)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # [..., K]
        activation: Activation,
        parts: tuple[Part, Part, Part],
        origin_x: Tensor | None,  # [..., K]
        origin_weight: Tensor | None,  # [K]
        offset: float | None,
        eps: float | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        requested = ctx.needs_input_grad[_ARGUMENTS:]
        y, e, f, kept, needs, recipe = _forward(x, activation, parts, tensors, requested, ctx.needs_input_grad[0])
        *both, _ = needs
        reads_x = any(any(of_part[1:]) for of_part in both)
        ctx.save_for_backward(
            x if reads_x and origin_x is None else None,
            *((origin_x, origin_weight) if reads_x else (None, None)),
            e,
            f,
            *[t for part in kept for t in (part.scales, part.product, part.u)],
            *tensors,
        )
        ctx.activation, ctx.parts, ctx.offset, ctx.eps, ctx.recipe = activation, parts, offset, eps, recipe
        ctx.calls, ctx.needs, ctx.requested = [part.call for part in kept], needs, requested
        ctx.output_is_saved, ctx.output_versions = kept[2].product is y, (autograd.version_of(y),)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return (transforms.once_differentiable(_backward) if torch.is_grad_enabled() else _backward)(ctx, dy)


_ARGUMENTS = 7  # before the layers' tensors
_DOWN_PRODUCT = 5 + 7  # its place among the saved tensors


def _forward(
    x: Tensor,
    activation: Activation,
    parts: tuple[Part, ...],
    tensors: Sequence[Tensor | None],
    requested: tuple[bool, ...],
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Kept, ...], tuple[Needs, ...], projection.Recipe | None]:
    """y, e, f, what each layer leaves for backward, the gradients it has to produce; and how they are one stage."""
    own = of_gate, of_up, of_down = projection.split(parts, tensors)
    if compiled.is_traced():
        made = compiled.forward(_BLOCK, x, parts, tensors, requested, needs_dx, activation)
        (e, kept_e), (f, kept_f), (y, kept_y) = made
        return y, e, f, (kept_e, kept_f, kept_y), projection.needs(parts, requested, needs_dx, is_mlp=True), None
    called = projection.prepare(parts[:2], x, own[:2])
    if calls.may_join(called) and parts[2].options is not None:
        h_like = projection.stand_in(x.shape[:-1] + (of_gate[-1].shape[0],), x.dtype, x.device)
        every = called + projection.prepare(parts[2:], h_like, own[2:])
        recipe = joined.recipe(x, every, own, parts, requested, needs_dx, is_mlp=True)
        if recipe is not None:
            (e, kept_e), (f, kept_f), (y, kept_y) = joined.forward(x, every, own, recipe, activation)
            return y, e, f, (kept_e, kept_f, kept_y), recipe.needs, recipe
    needs = projection.needs(parts, requested, needs_dx, is_mlp=True)
    e, kept_e = projection.forward(parts[0], called[0], x, of_gate, needs[0])
    f, kept_f = projection.forward(parts[1], called[1], x, of_up, needs[1])
    h = _gate(_kernels((kept_e, kept_f), e, f), e, f, activation)
    (called_y,) = projection.prepare(parts[2:], h, own[2:])
    y, kept_y = projection.forward(parts[2], called_y, h, of_down, needs[2])
    return y, e, f, (kept_e, kept_f, kept_y), needs, None


def _backward(ctx, dy: Tensor) -> tuple[Any, ...]:
    if compiled.is_traced():
        dx, *gradients = compiled.backward(_BLOCK, ctx, (dy,), ctx.activation)
        return dx, *[None] * (_ARGUMENTS - 1), *gradients
    x, origin_x, origin_weight, e, f, *rest = autograd.saved_tensors(
        ctx, (_DOWN_PRODUCT,) if ctx.output_is_saved else (), x_is_saved=True
    )

    origin = None if origin_x is None else NormOrigin(origin_x, origin_weight, ctx.offset, ctx.eps)
    kept = [Kept(call, *rest[3 * i : 3 * i + 3]) for i, call in enumerate(ctx.calls)]
    of_gate, of_up, of_down = projection.split(ctx.parts, rest[9:])
    wanted_e, wanted_f, wanted_y = projection.split(ctx.parts, ctx.requested)
    gate, up, down = ctx.parts
    needs_e, needs_f, needs_y = ctx.needs
    kernels = _kernels(kept, dy, e, f, x, origin_x, *rest)
    with transforms.without_autocast(dy.device):
        if kernels is not None and needs_y.x and (layers := _layers(ctx, kept, rest[9:], e)) is not None:
            return _backward_in_one_pass(ctx, dy, x, origin, e, f, layers, of_down[4])
        h = _gate(kernels, e, f, ctx.activation)
        dh, of_y = projection.backward(dy, h, of_down, down, kept[2], needs_y, wanted_y)
        del h
        dx, of_e, of_f = None, projection.no_gradients(gate), projection.no_gradients(up)
        if dh is not None:
            de, df = _gate_backward(kernels, dh, e, f, ctx.activation)
            del dh
            x = x if origin is None else origin.output()
            dx, of_f = projection.backward(df, x, of_up, up, kept[1], needs_f, wanted_f)
            del df
            dx_gate, of_e = projection.backward(de, x, of_gate, gate, kept[0], needs_e, wanted_e)
            dx = dx if dx_gate is None else dx_gate if dx is None else dx.add_(dx_gate)
    return dx, *[None] * (_ARGUMENTS - 1), *of_e, *of_f, *of_y


def _forward_in_operator(
    x: Tensor, parts: tuple[Part, ...], tensors: Sequence[Any], requested: tuple[bool, ...], needs_dx: bool, activation
) -> compiled.Outputs:
    y, e, f, kept, *_ = _forward(x, activation, parts, tensors, requested, needs_dx)
    return list(zip((e, f, y), kept, strict=True))


def _backward_in_operator(saved: compiled.Saved, dys: Sequence[Tensor]) -> Sequence[Tensor | None]:
    parts, own, (dy,) = saved.parts, saved.own(), dys
    I, K = parts[0].shape(own[0])
    x_like, h_like = (projection.stand_in(dy.shape[:-1] + (size,), dy.dtype, dy.device) for size in (K, I))
    saved.calls = projection.prepare(parts[:2], x_like, own[:2]) + projection.prepare(parts[2:], h_like, own[2:])
    saved.needs = projection.needs(parts, saved.requested, saved.needs_dx, is_mlp=True)
    saved.recipe = joined.recipe(x_like, saved.calls, own, parts, saved.requested, saved.needs_dx, is_mlp=True)
    dx, *rest = _backward(saved, dy)
    return dx, *rest[_ARGUMENTS - 1 :]


_BLOCK = compiled.define_block("gated_mlp", _forward_in_operator, _backward_in_operator)


def _gate(kernels: ModuleType | None, e: Tensor, f: Tensor, activation: Activation) -> Tensor:
    """h"""
    return _ACTIVATIONS[activation][0](e) * f if kernels is None else kernels.gate(e, f, activation)


def _gate_backward(
    kernels: ModuleType | None, dh: Tensor, e: Tensor, f: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """de, which may be written over dh, and df."""
    if kernels is not None:
        return kernels.gate_backward(dh, e, f, activation)
    act, act_backward = _ACTIVATIONS[activation]
    df = act(e).mul_(dh)
    return act_backward(dh.mul_(f), e), df


def _kernels(kept: Sequence[Kept], first: Tensor, *tensors: Tensor | None) -> ModuleType | None:
    """The gate's kernels, where a layer beside it runs on Triton and nothing looks on; else PyTorch's operations do."""
    on_triton = any(each.call is not None and each.call.options.backend == "triton" for each in kept)
    if not on_triton or first.numel() == 0 or not operators.is_direct(None, first, *tensors):
        return None
    from . import gate_kernels  # Triton is imported only when it is used

    return gate_kernels


def _layers(ctx, kept: Sequence[Kept], tensors: Sequence[Tensor | None], e: Tensor) -> tuple[Any, ...] | None:
    """The layers as the kernels of the whole backward take them, or None where these do not take them."""
    from . import mlp_kernels as kernels  # Triton is imported only when it is used

    layers: list[Any] = []
    for part, own, (call, scales, product, u), needs in zip(
        ctx.parts, projection.split(ctx.parts, tensors), kept, ctx.needs, strict=True
    ):
        *members, bias, weight = own[:6]
        if part.layout is not None or (bias is not None and len(layers) < 2):
            return None
        if call is None:
            layers.append(kernels.Layer(weight, needs=needs))
        else:
            adapter = operators.readable(Adapter(*members))
            layers.append(kernels.Layer(weight, adapter, scales, flat(product), u, call.options, needs))
    return tuple(layers) if kernels.can_run(e, tuple(layers)) else None


def _backward_in_one_pass(
    ctx, dy: Tensor, x: Tensor | None, origin: NormOrigin | None, e: Tensor, f: Tensor, layers: Any, bias: Tensor | None
) -> tuple[Any, ...]:
    from . import mlp_kernels as kernels

    dx, gradients = kernels.backward(dy, x, origin, e, f, layers, ctx.activation, ctx.recipe)
    results: list[Tensor | None] = []
    for part, layer, own in zip(ctx.parts, layers, gradients, strict=True):
        members = own if layer.adapter is None else layer.adapter
        for gradient, t in zip(own, members, strict=True):
            results.append(gradient if gradient is None or gradient.dtype == t.dtype else gradient.to(t.dtype))
        results += [None] * (part.size - 4)
    if projection.split(ctx.parts, ctx.requested)[2][4]:  # down's bias
        results[-2] = projection.bias_gradient(dy, given(bias))
    return dx, *[None] * (_ARGUMENTS - 1), *results
