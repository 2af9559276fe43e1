"""Parts of a layer on Triton kernels, in a stage: of one layer (``triton_backend``), and of those of a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Adapter, NormOrder, Scales, given, separate_product, zero_stand_in
from ..kernels import norms
from ..kernels.gemm import scaled_gemm
from ..kernels.low_rank import project
from ..kernels.tail import add_parts

try:  # what PyTorch's products follow, whichever of its settings was used; the attribute below takes 1.5 µs
    from torch._C import _get_fp32_precision_getter as _matmul_precision
except ImportError:

    def _matmul_precision(backend: str, op: str) -> str:
        return torch.backends.cuda.matmul.fp32_precision


def through(
    dy: Tensor,
    weight: Tensor,
    adapter: Adapter,
    scales: Scales,
    seed: Tensor | None,
    *,
    folded: bool = False,
    needs_dx: bool,
    needs_D: bool,
    scaling: float,
    dropout_p: float = 0.0,
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(3) and (4) in a stage: dx and the product that D is made from, where needed, and v. ``folded``: dy is dy⊙a."""
    lora_A, lora_B, word = adapter.lora_A, adapter.lora_B, None if dropout_p else scales.cancelled
    dy_scaled, parts, rounded_parts = project(
        dy, lora_B.T, None if folded else scales.row_scale, word, None,
        scaling=scaling, dropout_p=0.0, precision=precision,
    )  # (3)  # fmt: skip
    if not needs_dx:
        return None, None, add_parts(parts, rounded_parts, word)[0]
    dx, product, v = scaled_gemm(
        dy_scaled, weight.T, parts, rounded_parts, lora_A, lora_B, word, scales.col_scale, None, seed,
        scaling=scaling, dropout_p=dropout_p, precision=precision, **kept_product(needs_D, dy.dtype, None),
    )  # (4)  # fmt: skip
    return dx, product, v


Sums = tuple[Tensor | None, Tensor | None, Tensor | None]  # of an axis: −S / norm², d_magnitude, d_factor


def add_norm_paths(
    weight: Tensor,
    adapter: Adapter,
    scales: Scales,
    row_sums: Sums,
    col_sums: Sums,
    *,
    norm_order: NormOrder,
    scaling: float,
    eps: float,
    stand_in: float,
    precision: str,
) -> None:
    """(8) to (11) in a stage: added to what the sums over tokens gave."""
    lora_A, lora_B, magnitude_row, magnitude_col = adapter
    coefficient, dm_row, dB = row_sums
    row = norms.Axis(
        weight, lora_B, scales.row_norm, scales.row_scale, magnitude_row, coefficient, scales.row_product, dm_row, dB
    )
    coefficient, dm_col, dA = col_sums
    col = norms.Axis(
        weight.T, lora_A.T, scales.col_norm, scales.col_scale, magnitude_col,
        coefficient, scales.col_product, dm_col, None if dA is None else dA.T,
    )  # fmt: skip
    first, second = (row, col) if adapter.members.rows_first(norm_order) else (col, row)
    common: dict = {"scaling": scaling, "eps": eps, "stand_in": stand_in, "precision": precision}
    norms.add_norm_path(first, second, given(scales.cancelled), first=True, **common)  # (8), (9), (10)
    if second.d_factor is not None:
        norms.add_norm_path(second, first, given(scales.cancelled), first=False, **common)  # (11)


def kept_product(needed: bool, dtype: torch.dtype, bias: Tensor | None) -> dict:
    """Where ``scaled_gemm`` leaves a product that a magnitude gradient needs, and what a zero scale counts as there."""
    apart, stand_in = needed and separate_product(dtype, bias), zero_stand_in(dtype)
    return {"save_product": apart, "stand_in": stand_in, "out_stand_in": stand_in if needed and not apart else 0.0}


def product_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: in IEEE float32, or as three TF32 products that come close to it.

    Plain TF32 truncates its operands, which costs an accuracy that no half-precision result has to spare.
    """
    exact = dtype == torch.float32 and _matmul_precision("cuda", "matmul") != "tf32"
    return "ieee" if exact or torch.version.hip is not None else "tf32x3"


def float32_precision(is_wide: bool) -> str | None:
    """How float32 is multiplied, which launches depend on where there is any."""
    return product_precision(torch.float32) if is_wide else None
