"""The layer on Triton kernels: the "triton" backend. Equations and their numbers are those of ``factored``.

Launches: ``compute_scales`` 4 (2 for DoRA, none for LoRA), ``forward`` 2, ``backward`` 6 with detached norms and 10
with exact ones. All sums are made in two stages in a fixed order, so results are the same bits from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.gemm import scaled_gemm
from .kernels.low_rank import combine, project, reduce
from .kernels.moments import Axis, add_norm_path, norm
from .plan import Needs, Scales, projection_parts, separate_product, zero_stand_in


def compute_scales(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    *,
    scaling: float,
    norm_order: str,
    eps: float,
) -> Scales:
    """Norms and scales of the adapted weight, in float32."""
    if magnitude_row is None:
        return Scales()
    options = {"scaling": scaling, "eps": eps, "precision": _precision(weight.dtype)}
    if norm_order == "row_col" or magnitude_col is None:
        row_norm, row_scale, coefficient, row_product = norm(weight, lora_B, lora_A.T, magnitude_row, None, **options)
        if magnitude_col is None:
            return Scales(row_norm, None, row_scale, None, row_product, None)
        col_norm, col_scale, _, col_product = norm(weight.T, lora_A.T, lora_B, magnitude_col, coefficient, **options)
    else:
        col_norm, col_scale, coefficient, col_product = norm(weight.T, lora_A.T, lora_B, magnitude_col, None, **options)
        row_norm, row_scale, _, row_product = norm(weight, lora_B, lora_A.T, magnitude_row, coefficient, **options)
    return Scales(row_norm, col_norm, row_scale, col_scale, row_product, col_product)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scales: Scales,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    save_product: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Equations (1) and (2): the output [M, N], the product before the bias where it is kept apart, and u in parts."""
    precision = _precision(x.dtype)
    if x.shape[0] == 0:
        y = x.new_empty(0, weight.shape[0])
        parts = projection_parts(x.shape[1], lora_A.shape[0])
        u = x.new_empty(parts, 0, lora_A.shape[0], dtype=torch.float32)
        return y, torch.empty_like(y), u
    x_scaled, u = project(
        x, lora_A, scales.col_scale, seed, scaling=scaling, dropout_p=dropout_p, precision=precision
    )  # (1)
    apart = save_product and separate_product(x.dtype, bias)
    y, product = scaled_gemm(
        x_scaled, weight, u, lora_B.T, scales.row_scale, bias, None,
        dropout_p=0.0, stand_in=zero_stand_in(x.dtype), save_product=apart, precision=precision,
    )  # (2)  # fmt: skip
    return y, product if apart else None, u


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    scales: Scales,
    product: Tensor,
    u: Tensor,
    seed: Tensor | None,
    *,
    scaling: float,
    norm_order: str,
    detach_norm: bool,
    dropout_p: float,
    eps: float,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations (3) to (11): the gradients of x, lora_A, lora_B, magnitude_row and magnitude_col."""
    needs_S, needs_D = needs.sums(scales, norm_order, detach_norm)
    dtype = dy.dtype
    precision = _precision(dtype)
    stand_in = zero_stand_in(dtype)
    dx = dA = dB = dm_row = dm_col = row_coefficient = col_coefficient = dx_product = v = None

    if needs.x or needs.lora_A or needs_D:
        dy_scaled, v = project(
            dy, lora_B.T, scales.row_scale, None, scaling=scaling, dropout_p=0.0, precision=precision
        )  # (3)
    if needs.lora_B or needs_S:
        dB_parts, S_parts = reduce(
            dy, product if needs_S else None, u if needs.lora_B else None, None, dropout_p=0.0, precision=precision
        )
        dB = torch.empty_like(lora_B, dtype=torch.float32) if needs.lora_B else None
        row_coefficient, dm_row = combine(
            dB_parts, S_parts, scales.row_scale, scales.row_norm, magnitude_row, dB,
            multiplier=1.0, eps=eps, stand_in=stand_in,
        )  # (5), (6), (7)  # fmt: skip
    if needs.x or needs_D:
        apart = needs_D and separate_product(dtype, None)
        dx, dx_product = scaled_gemm(
            dy_scaled, weight.T, v, lora_A, scales.col_scale, None, seed,
            dropout_p=dropout_p, stand_in=stand_in, save_product=apart, precision=precision,
        )  # (4)  # fmt: skip
    if needs.lora_A or needs_D:
        dA_parts, D_parts = reduce(
            x, dx_product if needs_D else None, v if needs.lora_A else None, seed,
            dropout_p=dropout_p, precision=precision,
        )  # fmt: skip
        dA = torch.empty_like(lora_A, dtype=torch.float32) if needs.lora_A else None
        col_coefficient, dm_col = combine(
            dA_parts, D_parts, scales.col_scale, scales.col_norm, magnitude_col, None if dA is None else dA.T,
            multiplier=1.0 / (1.0 - dropout_p), eps=eps, stand_in=stand_in,
        )  # (5), (6), (7)  # fmt: skip

    if needs.norm_paths(scales, norm_order, detach_norm):
        row = Axis(
            weight, lora_B, scales.row_norm, scales.row_scale, magnitude_row,
            row_coefficient, scales.row_product, dm_row, dB,
        )  # fmt: skip
        col = Axis(
            weight.T, lora_A.T, scales.col_norm, scales.col_scale, magnitude_col,
            col_coefficient, scales.col_product, dm_col, None if dA is None else dA.T,
        )  # fmt: skip
        first, second = (row, col) if norm_order == "row_col" or magnitude_col is None else (col, row)
        options = {"scaling": scaling, "eps": eps, "stand_in": stand_in, "precision": _precision(weight.dtype)}
        add_norm_path(first, second, first=True, **options)  # (8), (9), (10)
        if second.d_factor is not None:
            add_norm_path(second, first, first=False, **options)  # (11)

    return (
        dx if needs.x else None,
        dA.to(lora_A.dtype) if needs.lora_A else None,
        dB.to(lora_B.dtype) if needs.lora_B else None,
        dm_row.to(magnitude_row.dtype) if needs.magnitude_row else None,
        dm_col.to(magnitude_col.dtype) if needs.magnitude_col else None,
    )


def _precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: in IEEE float32, or as three TF32 products that come close to it.

    Plain TF32 truncates its operands, which costs an accuracy that no half-precision result has to spare.
    """
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return "ieee" if exact or torch.version.hip is not None else "tf32x3"
