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

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..contract import Needs, accumulation_dtype, projection_parts, scales_size, separate_product
from . import torch_backend

_NOTHING = nullcontext()


@functools.cache
def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return torch_backend
    from . import triton_backend  # Triton is imported only when it is used

    return triton_backend


def _context(backend: str, tensor: Tensor) -> AbstractContextManager:
    """What a backend runs in: PyTorch operations without autocast, kernels on the tensor's device."""
    if backend == "torch":
        kind = tensor.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


def draw_dropout(x: Tensor, dropout_p: float, backend: str) -> Tensor:
    """What the backend's dropout is a function of: a seed [1] for "triton", the keep mask [M, K] for "torch"."""
    if backend == "triton":
        return torch.randint(0, 2**31 - 1, (1,), device=x.device)
    return torch.rand((x.numel() // x.shape[-1], x.shape[-1]), device=x.device) >= dropout_p


_library = torch.library.Library("bora_kernels", "DEF")
_library.define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude_row, Tensor? magnitude_col,"
    " Tensor? scales, Tensor? bias, Tensor? dropout, float scaling, str norm_order, float dropout_p, float eps,"
    " bool products, bool save_product, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude_row,"
    " Tensor? magnitude_col, Tensor? scales, Tensor? product, Tensor? u, Tensor? dropout, float scaling,"
    " str norm_order, bool detach_norm, float dropout_p, float eps, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    """Kernels read magnitudes and biases without a stride."""
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def _forward(
    x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, bias, dropout,
    scaling, norm_order, dropout_p, eps, products, save_product, backend, prepared=None,
):  # fmt: skip
    with _context(backend, x):
        return _implementation(backend).forward(
            x, weight, lora_A, lora_B, _contiguous(magnitude_row), _contiguous(magnitude_col), scales,
            _contiguous(bias), dropout, scaling=scaling, norm_order=norm_order, dropout_p=dropout_p, eps=eps,
            products=products, save_product=save_product, prepared=prepared,
        )  # fmt: skip


def _forward_fake(
    x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, bias, dropout,
    scaling, norm_order, dropout_p, eps, products, save_product, backend,
):  # fmt: skip
    y = x.new_empty(x.shape[0], weight.shape[0])
    product = torch.empty_like(y) if save_product and separate_product(x.dtype, bias) else None
    rank, columns = lora_A.shape
    parts = [projection_parts(columns, rank)] if backend == "triton" else []
    u = x.new_empty(*parts, x.shape[0], rank, dtype=accumulation_dtype(x.dtype))
    made = None
    if scales is None and magnitude_row is not None:
        size = scales_size(*weight.shape, rank, magnitude_col is not None, products and backend == "triton")
        made = weight.new_empty(size, dtype=accumulation_dtype(weight.dtype))
    return y, product, u, made


def _backward(
    dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, product, u, dropout,
    scaling, norm_order, detach_norm, dropout_p, eps, needs, backend, prepared=None,
):  # fmt: skip
    arguments = (dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, product, u, dropout)
    if dy.shape[0] == 0:  # no token, no gradient, and nothing that a kernel could be launched on
        options = (scaling, norm_order, detach_norm, dropout_p, eps, needs, backend)
        return tuple(None if g is None else g.zero_() for g in _backward_fake(*arguments, *options))
    with _context(backend, dy):
        gradients = _implementation(backend).backward(
            *arguments[:5], _contiguous(magnitude_row), _contiguous(magnitude_col), *arguments[7:],
            scaling=scaling, norm_order=norm_order, detach_norm=detach_norm, dropout_p=dropout_p, eps=eps,
            needs=Needs(*needs), prepared=prepared,
        )  # fmt: skip
    wanted = zip(gradients, (dy, lora_A, lora_B, magnitude_row, magnitude_col), strict=True)
    return tuple(g if g is None or g.dtype == t.dtype else g.to(t.dtype) for g, t in wanted)


def _backward_fake(
    dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, product, u, dropout,
    scaling, norm_order, detach_norm, dropout_p, eps, needs, backend,
):  # fmt: skip
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if needs[0] else None  # x itself may be absent
    wanted = zip((lora_A, lora_B, magnitude_row, magnitude_col), needs[1:], strict=True)
    rest = (torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None for t, need in wanted)
    return dx, *rest


def _without_autocast(operator, device_type: str):
    """The autocast rule: x (or dy) arrives in the autocast dtype from ``bora_linear``; nothing else is cast."""

    def call(*arguments):
        with torch.autocast(device_type, enabled=False):
            return operator(*arguments)

    return call


def _define(name: str, body: Callable, fake: Callable) -> Callable:
    """Register an operator, and return what calls it: in plain eager mode the body itself, which costs less time.

    An operator returns tensors only, so an absent result is an empty tensor there and None where the body is called.
    ``prepared`` stands for plain tensors that were looked at before, and is for the body only.
    """

    def with_empty(function):
        def call(*arguments):
            like = next(argument for argument in arguments if isinstance(argument, Tensor))
            return tuple(like.new_empty(0) if result is None else result for result in function(*arguments))

        return call

    _library.impl(name, with_empty(body), "CompositeExplicitAutograd")
    torch.library.register_fake(f"bora_kernels::{name}", with_empty(fake), lib=_library)
    operator = getattr(torch.ops.bora_kernels, name).default
    for device_type in ("cuda", "cpu"):
        _library.impl(name, _without_autocast(operator, device_type), f"Autocast{device_type.upper()}")

    def call(*arguments, prepared: object = None):
        if prepared is None and (torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, arguments))):
            return operator(*arguments)  # tensor subclasses have rules of their own
        if is_in_torch_dispatch_mode():
            return operator(*arguments)
        return body(*arguments, prepared=prepared)

    return call


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), float, int, bool, str, list))

forward = _define("forward", _forward, _forward_fake)
backward = _define("backward", _backward, _backward_fake)
