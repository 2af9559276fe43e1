"""``BoraLinearFunction``, the custom backward, and ``adapted_linear``, the layer on one device."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _private, quantized, reference
from ..contract import Adapter, Needs, Options, flat, given, separate_product, unflat
from . import balance, calls, operators, overwritten, reuse, transforms


class BoraLinearFunction(torch.autograd.Function):
    """y = x·W'ᵀ + bias on operators whose backward is closed form; see ``torch_backend`` for the equations.

    Saved for backward: x, the product before the bias (y itself where there is none), u = s·x·(A⊙g)ᵀ, the factors,
    and the norms and scales. Nothing of the weight's size is saved, and no gradient of that size is ever made.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # [..., K]
        lora_A: Tensor,  # [R, K]
        lora_B: Tensor,  # [N, R]
        magnitude_row: Tensor | None,  # [N]
        magnitude_col: Tensor | None,  # [K]
        bias: Tensor | None,  # [N]
        dropout: Tensor | None,  # what the backend draws its mask from
        call: calls.Call,
        *stored: Tensor,  # the weight [N, K], or what a quantized one is stored as
    ) -> Tensor:
        needs = Needs(*ctx.needs_input_grad[:5])
        adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
        y, product, u, flat_scales, needs_S, needs_D = layer_forward(needs, x, adapter, bias, dropout, call, stored)
        apart = separate_product(x.dtype, bias)
        ctx.save_for_backward(
            x if needs.lora_A or needs_D else None,
            *adapter,
            flat_scales,
            (product if apart else y) if needs_S else None,
            u if needs.lora_B else None,
            dropout,
            *stored,
        )
        ctx.needs, ctx.call, ctx.output_is_saved = needs, call, needs_S and not apart
        if ctx.output_is_saved:
            overwritten.protect()
            ctx.output_versions = (version_of(y),)
        # what hooks hand back for a saved tensor may lie in memory otherwise
        if call.prepared is not None and _private.saved_tensors_hooks(True) is not None:
            ctx.call = call._replace(prepared=None)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        # grad mode is on for create_graph=True alone, and only then is there a second derivative to refuse
        return (transforms.once_differentiable(_backward) if torch.is_grad_enabled() else _backward)(ctx, dy)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dA = dB = dm_row = dm_col = d_bias = None
    if any(ctx.needs):
        saved = saved_tensors(ctx, (_PRODUCT,) if ctx.output_is_saved else ())
        dx, dA, dB, dm_row, dm_col = layer_backward(ctx.needs, dy, saved, ctx.call, ctx.output_is_saved)
    if ctx.needs_input_grad[5]:
        d_bias = flat(dy).sum(0)
    others = len(ctx.needs_input_grad) - 6
    return dx, dA, dB, dm_row, dm_col, d_bias, *[None] * others


def layer_backward(
    needs: Needs, dy: Tensor, saved: tuple[Any, ...], call: calls.Call, product_is_saved: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of x, lora_A, lora_B, magnitude_row and magnitude_col, of which one at least is needed.

    ``saved`` is x, the adapter, the scales, the product, u, what dropout is a function of, and the weight or what it is
    stored as. A product that is None though ``product_is_saved`` is made again.
    """
    x, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, product, u, dropout, *stored = saved
    options, layout, prepared = call
    weight = stored[0]
    shape = dy.shape
    # a stage takes rows as they lie in memory, without a view
    if prepared is None or not prepared.joins or not all(t is None or t.is_contiguous() for t in (dy, x, product)):
        dy, x, product = flat(dy), flat(x), flat(product)
    adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
    plans: object | None = calls.prepare_backward(prepared, dy, saved)
    if layout is not None:
        direct = operators.is_direct(plans, dy, *stored)
        backend = given(options.backend)
        weight = quantized.dense(layout, stored, dy.dtype, backend, "backward", direct=direct, prepared=plans)
    if product_is_saved and overwritten.is_overwritten(product, dy):
        if x is None:
            raise RuntimeError(f"{_CHANGED}: train lora_A too, or change a copy, layer(x).clone()")
        product = None
    original, (adapter, power) = adapter, balance.balanced(dy, weight, adapter, options)
    if product is None and product_is_saved:
        plans, dy, x = None, flat(dy), flat(x)
        product = operators.forward(
            x, weight, adapter, flat_scales, None, dropout, options, products=False, save_product=False
        )[0]
    gradients = operators.backward(
        dy, x, weight, adapter, flat_scales, product, u, dropout, options, needs, prepared=plans
    )
    dx, *rest = balance.gradients_of(original, gradients, power, options)
    if dx is not None and dx.ndim != len(shape):
        dx = dx.view(*shape[:-1], weight.shape[1])
    return dx, *rest


def find_scales(
    x: Tensor, weight: Tensor, adapter: Adapter, options: Options, stored: Sequence[Tensor], products: bool
) -> tuple[Tensor | None, Callable[[Tensor], None] | None]:
    """Scales that the layer had before, and what to hand new ones to, as ``reuse.find`` does."""
    if not reuse.may_find() or not any(adapter.members):
        return None, None

    def state() -> tuple | None:
        balances = x.dtype == torch.float16
        basis = (options.scaling, options.norm_order, options.eps, options.backend, weight.dtype, balances)
        return reuse.state_of((*stored, *adapter), basis)

    return reuse.find(adapter.lora_B, state, products)


def saved_tensors(ctx, outputs: tuple[int, ...], *, x_is_saved: bool = False) -> tuple[Any, ...]:
    """The saved tensors, without those at the places of ``outputs`` that are outputs and were changed in place since.

    Such a change is one that a plain linear layer admits; the product is then made again, from x, the first of them
    unless ``x_is_saved`` says that there is one anyway.
    """
    if torch.compiler.is_compiling() or not outputs:
        return ctx.saved_tensors
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        raw = _private.raw_saved_tensors(ctx)
        if raw is None:
            raise RuntimeError(f"{_CHANGED}: {_INSTEAD}") from error
        others = [_unpacked(each, place in outputs) for place, each in enumerate(raw)]
        if others[0] is None and not x_is_saved:
            raise RuntimeError(f"{_CHANGED}: {_INSTEAD}") from error
    else:
        # what hooks hand back, those of checkpointing too, PyTorch does not look at
        versions = zip(outputs, ctx.output_versions, strict=True)
        changed = [place for place, version in versions if version_of(saved[place]) > version]
        if not changed:
            return saved
        if saved[0] is None and not x_is_saved:
            raise RuntimeError(f"{_CHANGED}: {_INSTEAD}")
        others = [None if place in changed else each for place, each in enumerate(saved)]
    _warn_of_changed_output()
    return tuple(others)


def version_of(output: Tensor | None) -> int:
    """How often a tensor was changed in place, as far as PyTorch knows."""
    return 0 if output is None or torch.compiler.is_compiling() or output.is_inference() else output._version


def _unpacked(saved: Any, is_output: bool) -> Tensor | None:
    try:
        return saved.unpack()
    except RuntimeError:
        if not is_output:
            raise
        return None


_CHANGED = "the output of an adapted layer without a bias was changed in place before its backward, which reads it"
_INSTEAD = "write out = out + … instead of out += …, or change a copy, layer(x).clone()"


@functools.cache
def _warn_of_changed_output() -> None:
    warnings.warn(f"{_CHANGED}. It is computed again, in the time of a forward: {_INSTEAD}.", stacklevel=2)


def layer_forward(
    needs: Needs,
    x: Tensor,
    adapter: Adapter,
    bias: Tensor | None,
    dropout: Tensor | None,
    call: calls.Call,
    stored: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, bool, bool]:
    """The output, and what a backward with these needs uses again: the product before the bias, u, the scales.

    And whether it needs that product and, for D, x. A quantized weight (``stored`` is what it is stored as) is dense as
    long as this call runs.
    """
    options, layout, prepared = call
    backend, weight = options.backend, stored[0]
    if layout is not None:
        direct = operators.is_direct(prepared, x, *stored)
        weight = quantized.dense(layout, stored, x.dtype, given(backend), "forward", direct=direct, prepared=prepared)
    members = adapter.members
    paths = needs.norm_paths(members, options)
    needs_S, needs_D = needs.sums(members, paths)
    flat_scales, remember = find_scales(x, weight, adapter, options, stored, paths)
    # a stage takes rows as they lie in memory, without a view
    rows = x if prepared is not None and prepared.joins and x.is_contiguous() else flat(x)
    y, product, u, made = operators.forward(
        rows, weight, balance.balanced(x, weight, adapter, options)[0], flat_scales, bias, dropout, options,
        products=paths, save_product=needs_S, prepared=prepared,
    )  # fmt: skip
    if flat_scales is None and any(members):
        flat_scales = made
        if remember is not None and made is not None:
            remember(made)
    if y.ndim != x.ndim:
        y = unflat(y, x.shape[:-1])
    if backend == "dense":  # has all from x and the parameters
        needs_S, needs_D = False, any(needs[1:])
    return y, product, u, flat_scales, needs_S, needs_D


_PRODUCT = 6  # its place among the saved tensors
_NO_NEEDS = Needs(False, False, False, False, False)
_ALL_NEEDS = Needs(True, True, True, True, True)


def adapted_linear(
    x: Tensor, weight: Tensor | quantized.Quantized, adapter: Adapter, bias: Tensor | None, options: Options
) -> Tensor:
    """``bora_linear`` on one device: checks the tensors, chooses the backend and runs it."""
    x, call = calls.prepare(x, (weight, *adapter, bias), options)
    options = call.options
    if options.backend == "reference":
        keywords = options._asdict()
        del keywords["backend"]
        dense = weight.dense(x.dtype) if isinstance(weight, quantized.Quantized) else weight
        return reference.bora_linear_ref(x, dense, *adapter, bias, training=True, **keywords)
    stored = weight.tensors if isinstance(weight, quantized.Quantized) else (weight,)
    if call.prepared is None or transforms.in_forward_mode():
        fused = "torch" if options.backend == "dense" else options.backend  # the names that users know
        transforms.refuse(f'"{fused}"', 'backend must be "reference"', x, *stored, *adapter, bias)
    dropout = operators.draw_dropout(x, options) if options.dropout_p > 0.0 else None
    if not torch.is_grad_enabled() or transforms.exporting():  # an exported operator has its own derivative
        needs = _ALL_NEEDS if torch.is_grad_enabled() else _NO_NEEDS
        return layer_forward(needs, x, adapter, bias, dropout, call, stored)[0]
    return BoraLinearFunction.apply(x, *adapter, bias, dropout, call, *stored)
