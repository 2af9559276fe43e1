"""The layer on Triton kernels: the "triton" backend. Equations and their numbers are those of ``torch_backend``.

Launches: ``forward`` 2, and 4 more where it computes scales (2 for DoRA, none for LoRA); ``backward`` 6 with detached
norms and 10 with exact ones; each one more where the base product takes a tail or the projection was made in parts
(``kernels.tail``), over a float32 weight (``kernels.gemm_of_v``), for each read of W0 at ranks above 64
(``kernels.gram``), for each projection at ranks above 16 and each sum over tokens at ranks above 32
(``kernels.terms``). All sums are made in two stages in a fixed order, so results are the same bits from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import (
    Adapter,
    Needs,
    Options,
    Slots,
    flat,
    scales_size,
    split_scales,
    unflat,
    zero_stand_in,
)
from ..kernels import mixed, norms
from ..kernels.combine import combine
from ..kernels.gemm import scaled_gemm
from ..kernels.low_rank import project, reduce
from ..replay.recording import beside_last_launch, empty
from ..replay.stage import compiled_with, stage
from .triton_parts import add_norm_paths, kept_product, product_precision, through


def forward(
    x: Tensor,
    weight: Tensor,
    adapter: Adapter,
    flat_scales: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
    *,
    products: bool,
    save_product: bool,
    prepared: object = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Equations (1) and (2): the output [..., N], the product before the bias where it is kept apart, u, scales.

    Norms and scales of the adapted weight are one flat float32 tensor (``contract.split_scales``), made here unless
    they are given; then the returned ones are None. ``products`` keeps what a backward with exact gradients needs
    again. For ``prepared`` see ``replay.stage``.
    """
    return _forward(
        x, weight, *adapter, flat_scales, bias, seed,
        scaling=options.scaling, norm_order=options.norm_order, dropout_p=options.dropout_p, eps=options.eps,
        products=products, **kept_product(save_product, x.dtype, bias),
        precision=product_precision(x.dtype), weight_precision=product_precision(weight.dtype), prepared=prepared,
    )  # fmt: skip


@stage
def _forward(
    x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, bias, seed, *,
    scaling, norm_order, dropout_p, eps, products, save_product, stand_in, out_stand_in, precision, weight_precision,
):  # fmt: skip
    lead, x = x.shape[:-1], flat(x)
    M, N, R = x.shape[0], weight.shape[0], lora_A.shape[0]
    adapter, made = Adapter(lora_A, lora_B, magnitude_row, magnitude_col), None
    members = adapter.members
    if flat_scales is None and any(members):
        flat_scales = made = empty((scales_size(weight.shape, R, members, products),), torch.float32, x.device)
        _compute_scales(
            weight, adapter, split_scales(made, weight.shape, R, members),
            norm_order=norm_order, scaling=scaling, eps=eps, precision=weight_precision,
        )  # fmt: skip
    if M == 0:
        y, product = (empty((0, N), x.dtype, x.device) for _ in range(2))
        u = empty((0, R), torch.float32, x.device)
        return y, product if save_product else None, u, made
    scales = split_scales(flat_scales, weight.shape, R, members)
    word = None if dropout_p else scales.cancelled
    x_scaled, parts, rounded_parts = project(
        x, lora_A, scales.col_scale, word, seed, scaling=scaling, dropout_p=dropout_p, precision=precision
    )  # (1)
    y, product, u = scaled_gemm(
        x_scaled, weight, parts, rounded_parts, lora_B.T, lora_A.T, word, scales.row_scale, bias, None, scaling=scaling,
        dropout_p=0.0, stand_in=stand_in, out_stand_in=out_stand_in, save_product=save_product, precision=precision,
    )  # (2)  # fmt: skip
    return unflat(y, lead), product if save_product else None, u, made


def _compute_scales(weight, adapter, scales, *, norm_order, scaling, eps, precision) -> None:
    lora_A, lora_B, magnitude_row, magnitude_col = adapter
    row = (weight, lora_B, lora_A.T, magnitude_row), (scales.row_norm, scales.row_scale, scales.row_product)
    col = (weight.T, lora_A.T, lora_B, magnitude_col), (scales.col_norm, scales.col_scale, scales.col_product)
    first, second = (row, col) if adapter.members.rows_first(norm_order) else (col, row)
    options = {"scaling": scaling, "eps": eps, "precision": precision}
    coefficient = norms.norm_and_scale(*first[0], None, *first[1], scales.cancelled, **options)
    if all(adapter.members):
        norms.norm_and_scale(*second[0], coefficient, *second[1], scales.cancelled, **options)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    adapter: Adapter,
    flat_scales: Tensor | None,
    product: Tensor,
    u: Tensor,
    seed: Tensor | None,
    options: Options,
    needs: Needs,
    *,
    prepared: object = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations (3) to (11): the gradients of x, lora_A, lora_B, magnitude_row and magnitude_col.

    Those of the parameters are in float32.
    """
    return _backward(
        dy, x, weight, *adapter, flat_scales, product, u, seed,
        scaling=options.scaling, norm_order=options.norm_order, detach_norm=options.detach_norm,
        dropout_p=options.dropout_p, eps=options.eps, needs=needs,
        precision=product_precision(dy.dtype), weight_precision=product_precision(weight.dtype), prepared=prepared,
    )  # fmt: skip


@stage
def _backward(
    dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, product, u, seed, *,
    scaling, norm_order, detach_norm, dropout_p, eps, needs, precision, weight_precision,
):  # fmt: skip
    lead, dy, x, product = dy.shape[:-1], flat(dy), flat(x), flat(product)
    adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
    members, options = adapter.members, Options(scaling, norm_order, detach_norm, dropout_p, eps)
    paths = needs.norm_paths(members, options)
    needs_S, needs_D = needs.sums(members, paths)
    scales = split_scales(flat_scales, weight.shape, lora_A.shape[0], members)
    dtype, device = dy.dtype, dy.device
    stand_in = zero_stand_in(dtype)
    word = None if dropout_p else scales.cancelled
    dx = dA = dB = dm_row = dm_col = row_coefficient = col_coefficient = dx_product = None

    if needs.x or needs.lora_A or needs_D:
        dx, dx_product, v = through(
            dy, weight, adapter, scales, seed, needs_dx=needs.x or needs_D, needs_D=needs_D,
            scaling=scaling, dropout_p=dropout_p, precision=precision,
        )  # fmt: skip
    if needs.lora_B or needs_S:
        with beside_last_launch():  # the product, which arithmetic bounds and not memory
            dB_parts, S_parts = reduce(
                dy, product if needs_S else None, u if needs.lora_B else None, word, None,
                dropout_p=0.0, precision=precision,
            )  # fmt: skip
            dB = empty(lora_B.shape, torch.float32, device) if needs.lora_B else None
            row_coefficient, dm_row = combine(
                dB_parts, S_parts, scales.row_scale, scales.row_norm, magnitude_row, dB,
                multiplier=1.0, eps=eps, stand_in=stand_in,
            )  # (5), (6), (7)  # fmt: skip
    if needs.lora_A or needs_D:
        dA_parts, D_parts = reduce(
            x, dx_product if needs_D else None, v if needs.lora_A else None, word, seed,
            dropout_p=dropout_p, precision=precision,
        )  # fmt: skip
        dA = empty(lora_A.shape, torch.float32, device) if needs.lora_A else None
        col_coefficient, dm_col = combine(
            dA_parts, D_parts, scales.col_scale, scales.col_norm, magnitude_col, None if dA is None else dA.T,
            multiplier=1.0 / (1.0 - dropout_p), eps=eps, stand_in=stand_in,
        )  # (5), (6), (7)  # fmt: skip

    if paths:
        add_norm_paths(
            weight, adapter, scales, (row_coefficient, dm_row, dB), (col_coefficient, dm_col, dA),
            norm_order=norm_order, scaling=scaling, eps=eps, stand_in=stand_in, precision=weight_precision,
        )  # fmt: skip
    results = (None if dx is None else unflat(dx, lead), dA, dB, dm_row, dm_col)
    return tuple(result if need else None for result, need in zip(results, needs, strict=True))


@compiled_with(_forward)
def _its_backward(
    results, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, bias, seed, *,
    scaling, norm_order, dropout_p, eps, products, save_product, stand_in, out_stand_in, precision, weight_precision,
) -> None:  # fmt: skip
    """The launches for all gradients, where the forward keeps something for them.

    Which are needed a forward does not know: kernels of those that are not are compiled in vain.
    """
    y, product, u, made = results
    if products or save_product or out_stand_in:
        _backward(
            y, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales if made is None else made,
            y if product is None else product, u, seed,
            scaling=scaling, norm_order=norm_order, detach_norm=not products, dropout_p=dropout_p, eps=eps,
            needs=Needs(True, True, True, magnitude_row is not None, magnitude_col is not None),
            precision=precision, weight_precision=weight_precision,
        )  # fmt: skip


def weighted_sums(
    W: Tensor, P: Tensor, Z: Tensor, coefficient: Tensor | None, cancelled: Tensor | None = None, *,
    scaling: float, signed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of V = W [I, J] + s·P [I, R]·Z [J, R]ᵀ: Σ_j c_j·V_ij² [I] and V·(c⊙Z) [I, R], in float32 (c = None: 1).

    And a tensor [4] that is not 0 where the update cancels a line; ``cancelled`` is what sums over the other axis, or
    for the norms, said of that. ``signed`` says that c has entries of either sign.
    """
    return _weighted_sums(
        W, P, Z, coefficient, cancelled, scaling=scaling, signed=signed, precision=product_precision(W.dtype)
    )


@stage
def _weighted_sums(W, P, Z, coefficient, cancelled, *, scaling, signed, precision):
    return norms.weighted_sums(W, P, Z, coefficient, cancelled, scaling=scaling, signed=signed, precision=precision)


def mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, slots: Slots, tokens: int) -> Tensor:
    """The layer for a batch of several adapters: see ``ops.mixed``. Two launches, or three."""
    return _mixed_linear(x, weight, bias, index, *slots, tokens=tokens, precision=product_precision(x.dtype))[0]


@stage
def _mixed_linear(x, weight, bias, index, lora_A, lora_B, row_scale, col_scale, *, tokens, precision):
    slots = Slots(lora_A, lora_B, row_scale, col_scale)
    return (mixed.mixed_linear(x, weight, bias, index, slots, tokens=tokens, precision=precision),)
