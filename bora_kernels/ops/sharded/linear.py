"""The layer over a weight that is sharded by rows or by columns: DTensors in, a DTensor out.

Every rank runs the operators of the whole layer on its shard. What is left is to complete the sums over the sharded
axis. With the numbers of ``torch_backend``, and [K] ([N]) for vectors of the replicated axis:

    weight sharded by            rows                     columns
    shards                       W0, B, m_r, bias, y      W0, A, m_c, x, dx
    replicas                     A, m_c, x                B, m_r, bias, dy
    forward, all-reduced         squares of γ   [K]       squares of ρ   [N]
    backward, all-reduced        D   [K]                  S   [N]
    and then                     dA  [R, K]               dB  [N, R]
    left as a partial sum        dx                       y

The sum for the axis normalized second is completed before (8), the other as S' of (9), so that either order takes one
vector. With detached norms the backward's two are one message. DoRA by rows and LoRA all-reduce dA or dB alone. BoRA in
float16 first agrees on a power of two (``balance``), from four numbers.
docs/tensor_parallel.md has the derivation, the bytes, and what overlaps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

from ...contract import (
    Adapter,
    Needs,
    Options,
    accumulation_dtype,
    flatten_scales,
    given,
    separate_product,
    split_scales,
)
from .. import adapted_weight, autograd, balance, operators, reuse, transforms
from . import calls
from .layout import (
    Layout,
    as_dtensor,
    check_placements,
    finish,
    to_local,
    to_local_together,
    whole_shape,
)
from .norms import add_norm_paths, norms_and_scales


def _compute_scales(
    weight: DTensor,
    adapter: Adapter,
    layout: Layout,
    options: Options,
    x: Tensor,
    local: Tensor,
    local_adapter: Adapter,
) -> tuple[Tensor | None, Tensor | None]:
    """The flat scales of this rank's shard, whose norms are those of the whole weight, and the power of ``balance``."""
    if not any(adapter.members):
        return None, None
    with transforms.without_autocast(local.device):
        local_adapter, power = balance.balanced(x, local, local_adapter, options, layout.completion())

    def state() -> tuple:  # the same on every rank: addresses are not, and a rank alone must not leave out a message
        versions = (None if t is None else (id(t), t._version) for t in (weight, *adapter))
        return options.scaling, options.norm_order, options.eps, power is not None, *versions

    trained = any(t is not None and t.requires_grad for t in adapter)
    products = trained and not options.detach_norm and options.backend == "triton"
    flat, remember = reuse.find(adapter.lora_B, state, products)
    if flat is None:
        with transforms.without_autocast(local.device):
            scales = norms_and_scales(local, local_adapter, options, layout.completion())
        if not products:
            scales = scales._replace(row_product=None, col_product=None)
        flat = flatten_scales(scales, local.shape, local_adapter.lora_A.shape[0])
        if remember is not None:
            remember(flat)
    return flat, power


# --- the layer --------------------------------------------------------------------------------------------------------


class ShardedBoraLinearFunction(torch.autograd.Function):
    """``BoraLinearFunction`` on shards: the local tensors come in, the local output and gradients go out."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # this rank's part of [..., K], as layout says
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude_row: Tensor | None,
        magnitude_col: Tensor | None,
        bias: Tensor | None,
        compute_scales: Callable[[Tensor, Tensor, Adapter], tuple[Tensor | None, Tensor | None]],
        layout: Layout,
        options: Options,
    ) -> Tensor:
        adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
        x = layout.gather(x)
        scales, power = compute_scales(x, weight, adapter)  # while x is under way
        x = finish(x)
        flat = x.reshape(math.prod(x.shape[:-1]), weight.shape[1])
        dropout = _draw_dropout(flat, layout, options) if options.dropout_p > 0.0 else None
        if bias is not None and not layout.by_rows and layout.mesh.get_local_rank() != 0:
            bias = None  # y is a sum over the ranks
        needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
        needs_S, needs_D = needs.sums(adapter.members, needs.norm_paths(adapter.members, options))
        y, product, u, _ = operators.forward(
            flat,
            weight,
            balance.times_power(adapter, power, options),
            scales,
            bias,
            dropout,
            options,
            products=False,
            save_product=needs_S,
        )
        if not separate_product(flat.dtype, bias):
            product = y
        if options.backend == "dense":  # has all from x and the parameters
            needs_S, needs_D = False, any(needs[1:])
        ctx.save_for_backward(
            flat if needs.lora_A or needs_D else None,
            weight,
            *adapter,
            scales,
            product if needs_S else None,
            u if needs.lora_B else None,
            dropout,
            power,
        )
        ctx.needs, ctx.layout, ctx.options = needs, layout, options
        return layout.send(y.view(*x.shape[:-1], weight.shape[0]), kept=needs_S and product is y)

    @staticmethod
    @transforms.once_differentiable
    def backward(ctx, dy: Tensor):
        dx = dA = dB = dm_row = dm_col = d_bias = None
        dy = ctx.layout.receive(dy)
        tokens = dy.shape[:-1]
        dy = dy.reshape(math.prod(tokens), dy.shape[-1])
        if any(ctx.needs):
            with transforms.without_autocast(dy.device):
                x, weight, *tensors, scales, product, u, dropout, power = ctx.saved_tensors
                adapter = Adapter(*tensors)
                gradients = _backward(
                    dy, tokens, x, weight, balance.times_power(adapter, power, ctx.options), scales, product, u,
                    dropout, ctx.needs, ctx.layout, ctx.options,
                )  # fmt: skip
                gradients = balance.gradients_of(adapter, gradients, power, ctx.options)
            dx, dA, dB, dm_row, dm_col = (
                gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True)
            )
        if ctx.needs_input_grad[6]:
            d_bias = dy.sum(0)
        return dx, None, dA, dB, dm_row, dm_col, d_bias, None, None, None


def _backward(
    dy: Tensor,
    tokens: torch.Size,
    x: Tensor | None,
    weight: Tensor,
    adapter: Adapter,
    flat_scales: Tensor | None,
    product: Tensor | None,
    u: Tensor | None,
    dropout: Tensor | None,
    needs: Needs,
    layout: Layout,
    options: Options,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, lora_A, lora_B, magnitude_row and magnitude_col, complete for the replicated ones."""
    members = adapter.members
    paths = needs.norm_paths(members, options)
    needs_S, needs_D = needs.sums(members, paths)
    wide = adapter.map(lambda t: t.to(accumulation_dtype(weight.dtype)))  # partial sums are wide
    asked = Needs(needs.x, needs.lora_A, needs.lora_B, needs_S, needs_D)
    dx, dA, dB, dm_row, dm_col = operators.backward(
        dy, x, weight, wide, flat_scales, product, u, dropout, options._replace(detach_norm=True), asked
    )  # (3) to (7)
    sent = None

    def send_dx() -> None:  # behind the first small message and beside what is computed from it
        nonlocal sent
        sent = None if dx is None else layout.scatter(dx.view(*tokens, weight.shape[1]))

    if not paths:
        if layout.by_rows:
            dA, dm_col = layout.all_reduce_together(dA, dm_col, between=send_dx)
        else:
            dB, dm_row = layout.all_reduce_together(dB, dm_row, between=send_dx)
    else:
        scales = split_scales(flat_scales, weight.shape, adapter.lora_A.shape[0], members)
        rows_first = members.rows_first(options.norm_order)
        complete_first = None
        if rows_first != layout.by_rows:  # the axis normalized first is the replicated one
            complete_first = functools.partial(layout.all_reduce, between=send_dx)
        elif layout.by_rows and dm_col is not None:
            dm_col = layout.all_reduce(dm_col, between=send_dx)
        elif not layout.by_rows and dm_row is not None:
            dm_row = layout.all_reduce(dm_row, between=send_dx)
        else:  # there is no second axis
            send_dx()
        dm_row, dm_col, dA, dB = add_norm_paths(
            weight, adapter, scales, dm_row, dm_col, dA, dB, options, complete_first
        )  # (8) to (11)
        if layout.by_rows and dA is not None:
            dA = layout.all_reduce(dA)
        elif not layout.by_rows and dB is not None:
            dB = layout.all_reduce(dB)
    adapter_gradients = (
        given(gradient).to(given(parameter).dtype) if need else None
        for gradient, parameter, need in zip((dA, dB, dm_row, dm_col), adapter, needs[1:], strict=True)
    )
    return None if sent is None else finish(sent), *adapter_gradients


def _draw_dropout(x: Tensor, layout: Layout, options: Options) -> Tensor:
    """``draw_dropout`` from a seed that the ranks share, plus their number where each has columns of its own."""
    seed = torch.randint(0, 2**31 - 1, (1,), device=x.device)
    dist.broadcast(seed, group=layout.group, group_src=0)
    if not layout.by_rows:
        seed += layout.mesh.get_local_rank()
    if options.backend == "triton":
        return seed
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.rand(x.shape, device=x.device, generator=generator) >= options.dropout_p


def bora_linear_sharded(
    x: Any,
    weight: DTensor,
    adapter: Adapter,
    bias: Tensor | None,
    options: Options,
    placements: tuple[Placement, Placement] | None = None,
) -> Tensor:
    """``bora_linear`` over a weight that is sharded on a mesh of one dimension; ``bora_linear`` calls it for a DTensor.

    Args:
        x: [..., K], of any placement on the weight's mesh. It is brought to where it is needed (replicated for a
            weight sharded by rows, sharded over K for one sharded by columns), and its gradient back.
        weight, adapter, bias: placed as in ``BY_ROWS`` or ``BY_COLUMNS``.
        options: as in ``bora_linear``, the same on every rank; ``backend`` is "triton", "torch" or None.
        placements: of x and of y where these are plain tensors, this rank's parts.

    Returns:
        y: [..., N], ``Shard(-1)`` for a weight sharded by rows, ``Partial()`` for one sharded by columns; for a plain x
            a plain tensor, this rank's part of y in its placement.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, before any communication.
    """
    mesh, (N, K) = weight.device_mesh, weight.shape
    ends = placements if isinstance(x, Tensor) and not isinstance(x, DTensor) else None
    call = calls.prepare(x, weight, adapter, bias, options, ends)
    x_shape = x.shape if ends is None else whole_shape(x, call.x_placement, K, mesh)
    layout = Layout(mesh, mesh.get_group(), call.by_rows, N, call.x_placement, x_shape, call.y_placement)
    weight_part, *adapter_parts, local_bias = to_local_together(weight, *adapter, bias)
    local, local_adapter = given(weight_part), Adapter(*adapter_parts)  # type: ignore[arg-type]  # factors are there
    x_local = x.to_local(grad_placements=[layout.dx_placement]) if ends is None else x
    if mesh.size() == 1:
        y = autograd.adapted_linear(x_local, local, local_adapter, local_bias, options)
    else:
        compute_scales = functools.partial(_compute_scales, weight, adapter, layout, call.options)
        y = ShardedBoraLinearFunction.apply(
            x_local.to(call.dtype), local, *local_adapter, local_bias, compute_scales, layout, call.options
        )
    return as_dtensor(y, mesh, layout.product_placement, (*x_shape[:-1], N)) if ends is None else y


def effective_weight_sharded(weight: DTensor, adapter: Adapter, options: Options) -> DTensor:
    """W' [N, K] as a DTensor that is sharded as ``weight`` is; see ``adapted_weight.effective_weight``."""
    by_rows = check_placements(weight, adapter)
    mesh = weight.device_mesh
    layout = Layout(mesh, mesh.get_group(), by_rows, weight.shape[0], Replicate(), ())
    merged = adapted_weight.effective_weight(
        to_local(weight), adapter.map(to_local), options,
        complete=layout.completion(), offset=layout.offset(weight.shape),
    )  # fmt: skip
    return as_dtensor(merged, weight.device_mesh, weight.placements[0], weight.shape)
