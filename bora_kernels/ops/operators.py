"""The operators that eager mode and ``torch.compile`` both see.

Two make a layer: ``forward``, with the norms of the adapted weight, and ``backward``. Each takes the backend's name and
hands over to ``torch_backend`` or ``triton_backend``. Operators return tensors only, so an absent result is an
empty tensor between here and the backends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _private
from .._library import define
from ..contract import (
    Adapter,
    Members,
    Needs,
    Options,
    accumulation_dtype,
    flat,
    scales_size,
    separate_product,
)
from . import dense_backend, flops, torch_backend, transforms

_NOTHING = nullcontext()


@functools.cache
def _implementation(backend: str) -> ModuleType:
    if backend != "triton":
        return dense_backend if backend == "dense" else torch_backend
    from . import triton_backend  # Triton is imported only when it is used

    return triton_backend


def context(backend: str, tensor: Tensor) -> AbstractContextManager:
    """What a backend runs in: PyTorch operations without autocast, kernels on the tensor's device."""
    if backend != "triton":
        return transforms.without_autocast(tensor.device)
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


def draw_dropout(x: Tensor, options: Options) -> Tensor:
    """What the backend's dropout is a function of: a seed [1] for "triton", else a mask [M, K] of what stays."""
    if options.backend == "triton":
        return torch.randint(0, 2**31 - 1, (1,), device=x.device)
    return torch.rand((x.numel() // x.shape[-1], x.shape[-1]), device=x.device) >= options.dropout_p


_library = define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude_row, Tensor? magnitude_col,"
    " Tensor? flat_scales, Tensor? bias, Tensor? dropout, float scaling, str norm_order, bool detach_norm,"
    " float dropout_p, float eps, str backend, bool products, bool save_product) -> (Tensor, Tensor, Tensor, Tensor)",
    "backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude_row,"
    " Tensor? magnitude_col, Tensor? flat_scales, Tensor? product, Tensor? u, Tensor? dropout, float scaling,"
    " str norm_order, bool detach_norm, float dropout_p, float eps, str backend, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


# --- what runs --------------------------------------------------------------------------------------------------------


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    """Kernels read magnitudes, biases, scales and u without strides."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def readable(adapter: Adapter) -> Adapter:
    """The adapter as kernels read it."""
    lora_A, lora_B, row, col = adapter
    if (row is None or row.is_contiguous()) and (col is None or col.is_contiguous()):
        return adapter
    return Adapter(lora_A, lora_B, _contiguous(row), _contiguous(col))


def _forward(x, weight, adapter, flat_scales, bias, dropout, options, products, save_product, prepared=None):
    with context(options.backend, x):
        return _implementation(options.backend).forward(
            x, weight, readable(adapter), flat_scales, _contiguous(bias), dropout, options,
            products=products, save_product=save_product, prepared=prepared,
        )  # fmt: skip


def forward_fake(x, weight, adapter, flat_scales, bias, dropout, options, products, save_product):
    """What ``_forward`` gives, without values."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    rank, triton, dense = adapter.lora_A.shape[0], options.backend == "triton", options.backend == "dense"
    transforms.refuse_onnx("torch" if dense else options.backend)  # the names that users know
    product = torch.empty_like(y) if save_product and separate_product(x.dtype, bias) and not dense else None
    u = x.new_empty(0) if dense else x.new_empty((x.shape[0], rank), dtype=accumulation_dtype(x.dtype))
    made = None
    if flat_scales is None and any(adapter.members):
        size = scales_size(weight.shape, rank, adapter.members, products and triton)
        made = weight.new_empty(size, dtype=accumulation_dtype(weight.dtype))
    return y, product, u, made


def _backward(dy, x, weight, adapter, flat_scales, product, u, dropout, options, needs, prepared=None):
    if dy.shape[0] == 0:  # no token, no gradient, and nothing that a kernel could be launched on
        gradients = _backward_fake(dy, x, weight, adapter, flat_scales, product, u, dropout, options, needs)
        return tuple(None if g is None else g.zero_() for g in gradients)
    with context(options.backend, dy):
        gradients = _implementation(options.backend).backward(
            dy, x, weight, readable(adapter), _contiguous(flat_scales), product, _contiguous(u), dropout, options,
            needs, prepared=prepared,
        )  # fmt: skip
    wanted = zip(gradients, (dy, *adapter), strict=True)
    return tuple([g if g is None or g.dtype == t.dtype else g.to(t.dtype) for g, t in wanted])


def _backward_fake(dy, x, weight, adapter, flat_scales, product, u, dropout, options, needs):
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if needs.x else None  # x itself may be absent
    wanted = zip(adapter, needs[1:], strict=True)
    rest = (torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None for t, need in wanted)
    return dx, *rest


# --- as operators -----------------------------------------------------------------------------------------------------


def _of_forward(function: Callable) -> Callable:
    """An operator's body, whose arguments are flat and whose absent results are empty tensors."""

    def call(x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, bias, dropout, *rest):
        adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
        results = function(x, weight, adapter, flat_scales, bias, dropout, Options(*rest[:6]), *rest[6:])
        return _with_empty(results, x)

    return call


def _of_backward(function: Callable) -> Callable:
    """The same for ``backward``."""

    def call(dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, product, u, dropout, *rest):
        adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
        options, needs = Options(*rest[:6]), Needs(*rest[6])
        return _with_empty(function(dy, x, weight, adapter, flat_scales, product, u, dropout, options, needs), dy)

    return call


def _with_empty(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _without_autocast(operator: Callable, device_type: str) -> Callable:
    """The autocast rule: x (or dy) arrives in the autocast dtype from ``bora_linear``; nothing else is cast."""

    def call(*arguments):
        with torch.autocast(device_type, enabled=False):
            return operator(*arguments)

    return call


def register(library: torch.library.Library, name: str, body: Callable, fake: Callable) -> Callable:
    """The operator of this name, which autocast leaves alone, with its body on all devices and its shapes."""
    library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bora_kernels::{name}", fake, lib=library)
    operator = getattr(torch.ops.bora_kernels, name).default
    for device_type in ("cuda", "cpu"):
        library.impl(name, _without_autocast(operator, device_type), f"Autocast{device_type.upper()}")
    return operator


_forward_operator = register(_library, "forward", _of_forward(_forward), _of_forward(forward_fake))
_backward_operator = register(_library, "backward", _of_backward(_backward), _of_backward(_backward_fake))
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


# --- their derivative, for graphs that hold the operator and not ``BoraLinearFunction`` (torch.export) ----------------


def _keep(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, bias, dropout, *rest = inputs
    y, product, u, made = output
    ctx.options, (products, save_product) = Options(*rest[:6]), rest[6:]
    members = Members(magnitude_row is not None, magnitude_col is not None)
    ctx.needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
    paths = ctx.needs.norm_paths(members, ctx.options)
    lacks = ctx.needs.sums(members, paths)[0] and not save_product
    ctx.complete = not lacks and (products or not paths)
    kept = (product if separate_product(x.dtype, bias) else y) if members.row else None
    scales = (made if flat_scales is None else flat_scales) if any(members) else None
    ctx.save_for_backward(
        x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, kept, u, dropout
    )  # fmt: skip
    ctx.mark_non_differentiable(product, u, made)


@transforms.once_differentiable
def _derivative(ctx, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.complete:
        raise RuntimeError(
            "bora_kernels::forward must be traced under torch.enable_grad() to have gradients: "
            "this graph keeps nothing for backward"
        )
    x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, product, u, dropout = ctx.saved_tensors
    adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
    gradients = backward(dy, x, weight, adapter, scales, product, u, dropout, ctx.options, ctx.needs)
    dx, *rest = gradients
    d_bias = dy.sum(0) if ctx.needs_input_grad[7] else None
    return dx, None, *rest, None, d_bias, *[None] * (len(ctx.needs_input_grad) - 8)


torch.library.register_autograd("bora_kernels::forward", _derivative, setup_context=_keep, lib=_library)


# --- calls ------------------------------------------------------------------------------------------------------------


def is_direct(prepared: object, *tensors: Any) -> bool:
    """Whether the body may be called without the dispatcher, which costs less time: plain eager mode.

    Tensor subclasses have rules of their own, the dispatcher knows what to do with meta tensors and views whose sign is
    the other; ``prepared`` stands for plain tensors that were looked at before.
    """
    if prepared is None:
        if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)):
            return False
        if tensors[0].is_meta or any(t is not None and t.is_neg() for t in tensors):
            return False
    if _private.is_watched():
        flops.teach_counters()
        return False
    return True


def forward(
    x: Tensor,
    weight: Tensor,
    adapter: Adapter,
    flat_scales: Tensor | None,
    bias: Tensor | None,
    dropout: Tensor | None,
    options: Options,
    *,
    products: bool,
    save_product: bool,
    prepared: object = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The output [M, N], the product before the bias where it is kept apart, u, and the scales if they were made here.

    On Triton with ``prepared`` x may be [..., K] and contiguous, and the output is [..., N]; so it is in ``backward``.

    In the dispatcher an absent result is an empty tensor, without it None.
    """
    if is_direct(prepared, x, weight, *adapter, flat_scales, bias, dropout):
        return _forward(x, weight, adapter, flat_scales, bias, dropout, options, products, save_product, prepared)
    return _forward_operator(flat(x), weight, *adapter, flat_scales, bias, dropout, *options, products, save_product)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    adapter: Adapter,
    flat_scales: Tensor | None,
    product: Tensor | None,
    u: Tensor | None,
    dropout: Tensor | None,
    options: Options,
    needs: Needs,
    *,
    prepared: object = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, lora_A, lora_B, magnitude_row and magnitude_col; None where not needed."""
    if is_direct(prepared, dy, x, weight, *adapter, flat_scales, product, u, dropout):
        return _backward(dy, x, weight, adapter, flat_scales, product, u, dropout, options, needs, prepared)
    tensors = flat(dy), flat(x), weight, *adapter, flat_scales, flat(product)
    gradients = _backward_operator(*tensors, u, dropout, *options, list(needs))
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
