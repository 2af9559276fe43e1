"""What a call may stand in besides plain eager mode: transforms and tracers, and inputs that are nested.

The "triton" and "torch" backends have one derivative, in reverse, in closed form. What needs another rule, or a graph
of PyTorch's own operations, is refused here with a sentence that says which way out there is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _private

_MERGE = "or the adapter merged first (layer.merge(), bora_kernels.merge_adapter(model))"
# Whether a transform of torch.func surrounds the call: its tensors have no memory of their own.
transforming, exporting = _private.transforming, _private.exporting


def plainly_eager() -> bool:
    """Whether no compiler, no transform and no tracer looks on: tensors have memory, and what is seen once holds."""
    return not (torch.compiler.is_compiling() or transforming() or torch.jit.is_tracing())


def refuse(what: str, way_out: str, *tensors: Tensor | None) -> None:
    """Raise ValueError where these tensors are in a transform or a tracer that ``what`` has no rule for."""
    if torch.compiler.is_compiling():
        return
    if transforming():
        raise ValueError(f"{way_out} in transforms of torch.func (grad, vmap, jvp and their kin), got {what}")
    if in_forward_mode() and any(_has_tangent(t) for t in tensors):
        raise ValueError(f"{way_out} for derivatives in forward mode, got {what}")
    if torch.jit.is_tracing():
        raise ValueError(f"{way_out} in torch.jit.trace and exports to ONNX, {_MERGE}, got {what}")


def refuse_onnx(backend: str) -> None:
    """Raise ValueError in an export to ONNX, which has no such operators.

    For operators' fake kernels: every way of tracing comes there, and the exporter tries one after the other.
    """
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        raise ValueError(f'backend must be "reference" in an export to ONNX, {_MERGE}, got "{backend}"')


def in_forward_mode() -> bool:
    """Whether derivatives in forward mode are open (``torch.autograd.forward_ad.dual_level``)."""
    # the level is private; without it such a derivative is refused under grad mode only, by PyTorch
    return getattr(forward_ad, "_current_level", -1) >= 0


class _NoSecondDerivative(torch.autograd.Function):
    """The identity of a gradient, whose derivative by whatever it depends on is an error."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _: Tensor) -> None:
        raise RuntimeError('the "triton" and "torch" backends have no second derivative: backend="reference" has')


class _Unpacked:
    """A backward's ctx whose saved tensors have been unpacked, which checkpoints allow once."""

    def __init__(self, ctx):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward whose gradients raise when they are differentiated, also where the gradient that came in is constant.

    PyTorch's decorator of this name leaves such gradients without a graph, or with one that leads to nothing that
    ``torch.autograd.grad`` is asked for, and a penalty on them without effect.
    """

    def call(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        causes = [t for t in (*gradients, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
        return tuple(
            t if t is None else _NoSecondDerivative.apply(t.detach().requires_grad_(), *causes) for t in results
        )

    return call


def _has_tangent(tensor: Tensor | None) -> bool:
    return isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast; on devices that have none, such as "meta", nothing."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def over_nested(x: Any, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """The layer on the rows of a nested tensor [batch, ragged, K], as ``torch.nn.functional.linear`` takes it.

    Raises ValueError for another layout than ``torch.jagged``, or where another dimension is the ragged one.
    """
    if x.layout != torch.jagged or getattr(x, "_ragged_idx", 1) != 1:
        found = "another ragged dimension" if x.layout == torch.jagged else f"layout {x.layout}"
        raise ValueError(f"x must be [batch, ragged, in_features] with layout torch.jagged where nested, got {found}")
    return torch.nested.nested_tensor_from_jagged(layer(x.values()), x.offsets(), x.lengths())
