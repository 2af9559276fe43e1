"""The adapted convolution: PyTorch's operations, and the weight V itself where the update cancels channels.

    y = a⊙[conv(x⊙g, W0) + s·B·conv(drop(x)⊙g, A)] + bias        V = W0 + s·B·A

Where the update cancels an output or an input channel, the two products are large and nearly opposite, and their
difference has few digits left. There the first is made with V, which has all that is left of W0, and the second counts
for nothing in y, nor in what x and g get through it; A and B get theirs through it as ever:

    y = a⊙conv(x⊙g, V) + bias        dx = g⊙convᵀ(a⊙dy, V)        D = Σ x⊙convᵀ(a⊙dy, V)

Whether it does, the norms say by a word on the device (``Scales.cancelled``). A CPU reads it. For other devices, where
to read would be to wait, ``weight_or_v`` makes the weight that PyTorch's convolution is given: a copy of W0, or V. It
lives no longer than a forward or a backward. Dropout prevents cancelling.

float16 holds 1e-3 of a weight's elements in few bits. There p⊙V⊙q stands for V, with powers of two near a and g, and
a / p and g / q for these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..contract import Adapter, Options, accumulation_dtype
from . import transforms
from .axis_scales import axis_scales
from .weight_or_v import Tensors, times_powers, weight_or_v

_MOST = 30  # the largest exponent of a power

Convolve = Callable[[Tensor, Tensor], Tensor]
"""convolve(x, weight): linear in x, and without a bias."""


def adapted_convolution(
    x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, convolve: Convolve, options: Options
) -> Tensor:
    """y in x's dtype; shapes are those of ``functional.bora_conv``. Dropout acts as the options say."""
    lora_A, lora_B, *_ = adapter
    may_cancel = options.dropout_p == 0.0
    row_scale, col_scale, word = axis_scales(weight, adapter, options, judge=may_cancel)
    if word is not None and _can_read(word) and not any(word.tolist()):
        word = None
    acc, scaling = accumulation_dtype(x.dtype), options.scaling
    channels = 1 - weight.ndim  # from the end, since x may lack the batch axis
    per_channel = (-1, *(1,) * (weight.ndim - 2))
    g = None if col_scale is None else col_scale.to(acc).view(per_channel)

    p = q = None
    if word is not None and x.dtype == torch.float16:
        p, q = (None if scale is None else _powers(scale, word) for scale in (row_scale, col_scale))
    g_of_product = g if g is None or q is None else g / q.view(per_channel)
    operands: tuple[Tensor, ...]
    if g_of_product is None:
        operands = (x,)
    elif x.dtype == acc:
        operands = (x * g_of_product,)
    else:
        operands = x, (x * (g_of_product - 1)).to(x.dtype)
    call = None if torch.compiler.is_compiling() else _Call()
    if not weight.requires_grad:
        weight = weight.detach()  # a parameter may get other memory after the call, where layers are cast for theirs
    if word is None:
        base = weight.to(x.dtype)
        products = tuple(convolve(t, base) for t in operands)
    else:
        tensors = Tensors(weight, lora_A.detach(), lora_B.detach(), word, p, q)
        products = _products(operands, tensors, convolve, scaling, call)
    if p is None:
        first, *others = (t.to(acc) for t in products)
    else:
        first, *others = (t / p.view(per_channel) for t in products)  # float32 by p's dtype
    product = sum(others, first)

    kept = None
    if word is not None:
        kept = (1 - word.amax(0)).to(acc)  # 0 where lines are cancelled
        x = _Derivative.apply(x, kept, call)
        g = None if g is None else _Derivative.apply(g, kept, call)
    dropped = F.dropout(x.to(acc), options.dropout_p, training=True)
    u = convolve(dropped if g is None else dropped * g, lora_A.to(acc))
    low_rank = torch.movedim(torch.movedim(u, channels, -1) @ lora_B.T.to(acc), -1, channels)
    y = product + (scaling * low_rank if kept is None else _Value.apply(low_rank, kept, scaling, call))
    if row_scale is not None:
        y = y * row_scale.to(acc).view(per_channel)
    if bias is not None:
        y = y + bias.to(acc).view(per_channel)
    return y.to(x.dtype)


def _can_read(word: Tensor) -> bool:
    """Whether to read it waits for nothing, and what is read holds."""
    return type(word) is Tensor and word.device.type == "cpu" and not torch.compiler.is_compiling()


def _powers(scale: Tensor, word: Tensor) -> Tensor:
    """Powers of two near a scale's values, in float32; ones where there is no word."""
    exponent = scale.detach().float().abs().log2().nan_to_num(0.0, 0.0, 0.0).round().clamp(-_MOST, _MOST)
    powers = exponent.to(torch.int32).add(127).bitwise_left_shift(23).view(torch.float32)  # exact, unlike exp2
    return torch.where(word.amax(0) != 0, powers, 1.0)


def _products(
    operands: tuple[Tensor, ...], tensors: Tensors, convolve: Convolve, scaling: float, call: _Call | None
) -> tuple[Tensor, ...]:
    """convolve(t, ``weight_or_v``) of each operand."""
    if call is None:  # the compiler cannot trace the derivative below: its own keeps the weight
        used = weight_or_v(tensors, scaling, operands[0].dtype)
        return tuple(convolve(t, used) for t in operands)
    return _Products.apply(convolve, scaling, call, *tensors, *operands)


class _Call:
    """What the nodes of one call know of each other: whether a derivative of it is differentiated again.

    V is a constant where it stands for the weight. A second derivative is therefore that of the two products as they
    are, and so is every derivative of this call from then on.
    """

    twice = False

    def is_twice(self) -> bool:
        """Asked in a backward."""
        self.twice = self.twice or torch.is_grad_enabled()
        return self.twice


class _Products(torch.autograd.Function):
    """convolve(t, ``weight_or_v``) of each t, whose backward makes that weight again."""

    @staticmethod
    def forward(
        ctx,
        convolve: Convolve,
        scaling: float,
        call: _Call,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        word: Tensor,
        p: Tensor | None,
        q: Tensor | None,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        tensors = Tensors(weight, lora_A, lora_B, word, p, q)
        ctx.save_for_backward(*tensors)
        ctx.convolve, ctx.scaling, ctx.call = convolve, scaling, call
        ctx.dtype, ctx.layouts = operands[0].dtype, [(t.shape, t.stride()) for t in operands]
        used = weight_or_v(tensors, scaling, ctx.dtype)
        return tuple(convolve(t, used) for t in operands)

    @staticmethod
    def backward(ctx, *upstream: Tensor | None):
        tensors = Tensors(*ctx.saved_tensors)
        with transforms.without_autocast(tensors.weight.device):
            twice = ctx.call.is_twice()
            if twice:
                used = times_powers(tensors.weight, tensors.p, tensors.q).to(ctx.dtype)
            else:
                used = weight_or_v(tensors, ctx.scaling, ctx.dtype)
            gradients = [
                _pulled_back(ctx.convolve, layout, used, dy) if need and dy is not None else None
                for need, layout, dy in zip(ctx.needs_input_grad[9:], ctx.layouts, upstream, strict=True)
            ]
        return *[None] * 9, *gradients


def _pulled_back(convolve: Convolve, layout: tuple[torch.Size, tuple[int, ...]], weight: Tensor, dy: Tensor) -> Tensor:
    """The gradient of t in convolve(t, weight) for that of the result, without t and without convolving.

    A linear map's derivative depends on no value of t: autograd's graph is made around what was not computed.
    """
    again = torch.is_grad_enabled()
    t = torch.empty_strided(*layout, dtype=weight.dtype, device=dy.device, requires_grad=True)
    with torch.enable_grad(), _WithoutConvolving():
        result = convolve(t, weight)
    return torch.autograd.grad(result, t, dy, create_graph=again)[0]


class _WithoutConvolving(TorchDispatchMode):
    """Convolutions in here return tensors of the right shape, and nothing in them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.convolution.default:
            return function(*args, **(kwargs or {}))
        t, weight, bias, *rest = args
        shape = _result_shape(t.shape, weight.shape, *(tuple(r) if isinstance(r, list) else r for r in rest))
        return t.new_empty(()).expand(shape)


@functools.lru_cache
def _result_shape(shape: torch.Size, weight_shape: torch.Size, *rest) -> torch.Size:
    t, weight = (torch.empty(size, device="meta") for size in (shape, weight_shape))
    return torch.ops.aten.convolution.default(t, weight, None, *rest).shape


class _Derivative(torch.autograd.Function):
    """t, whose derivative is that of t·kept."""

    @staticmethod
    def forward(ctx, t: Tensor, kept: Tensor, call: _Call | None) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.call = call
        return t.view_as(t)

    @staticmethod
    def backward(ctx, d: Tensor):
        return d if ctx.call is not None and ctx.call.is_twice() else d * ctx.saved_tensors[0], None, None


class _Value(torch.autograd.Function):
    """scaling·kept·t, whose derivative is that of scaling·t."""

    @staticmethod
    def forward(ctx, t: Tensor, kept: Tensor, scaling: float, call: _Call | None) -> Tensor:
        ctx.scaling, ctx.call = scaling, call
        return t * (scaling * kept)

    @staticmethod
    def backward(ctx, d: Tensor):
        if ctx.call is not None:
            ctx.call.is_twice()  # for those that come later
        return d * ctx.scaling, None, None, None
