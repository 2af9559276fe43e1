"""The end of sums over tokens: the parts of ``low_rank.reduce`` added in a fixed order, and magnitude gradients, (7).

Equation numbers are those of ``ops.torch_backend``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import given
from ..replay.recording import empty, launch
from .common import live_magnitude, load_vector, sum_parts, sum_vectors
from .config import cdiv, combine_config
from .overlap import overlapping, wait_for_last


@triton.jit
def _combine_kernel(
    factor_parts_ptr,  # [splits, C, R]
    total_parts_ptr,  # [splits, C]
    scale_ptr,  # [C]
    norm_ptr,  # [C]
    magnitude_ptr,  # [C]
    factor_ptr,  # [C, R]
    coefficient_ptr,  # [C]: −total / norm²
    d_magnitude_ptr,  # [C]
    splits, C,
    stride_fc, stride_fr,
    multiplier, eps, stand_in,
    R: tl.constexpr,
    BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_SCALE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    offs_c = tl.program_id(0) * BLOCK_SIZE_C + tl.arange(0, BLOCK_SIZE_C)
    offs_r = tl.program_id(1) * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    mask_c = offs_c < C
    mask = mask_c[:, None] & (offs_r < R)[None, :]
    if HAS_TOTAL:
        total = sum_vectors(total_parts_ptr, C, splits, offs_c, C)
    if HAS_FACTOR:
        acc = sum_parts(factor_parts_ptr, C * R, splits, offs_c, offs_r, C, R) * multiplier
        if HAS_SCALE:
            acc *= load_vector(scale_ptr, offs_c, C)[:, None]
        ptrs = factor_ptr + offs_c.to(tl.int64)[:, None] * stride_fc + offs_r.to(tl.int64)[None, :] * stride_fr
        tl.store(ptrs, acc, mask=mask)
    if HAS_TOTAL:
        live = live_magnitude(scale_ptr, norm_ptr, magnitude_ptr, offs_c, C, stand_in)
        norm = load_vector(norm_ptr, offs_c, C)
        # a clamped norm passes no gradient, and the true sum of a zero magnitude is zero
        flows = (norm > eps) & (load_vector(scale_ptr, offs_c, C) != 0.0)
        if tl.program_id(1) == 0:
            tl.store(coefficient_ptr + offs_c, tl.where(flows, -total / (norm * norm), 0.0), mask=mask_c)
            tl.store(d_magnitude_ptr + offs_c, total / live, mask=mask_c)  # (7)


def combine(
    factor_parts: Tensor | None,
    total_parts: Tensor | None,
    scale: Tensor | None,
    norm: Tensor | None,
    magnitude: Tensor | None,
    out: Tensor | None,
    *,
    multiplier: float,
    eps: float,
    stand_in: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Adds the parts of ``reduce``: writes multiplier·scale⊙Σ factor_parts to out [C, R].

    Returns −total / norm² [C], the coefficient that the norm paths start from, and d_magnitude [C].
    """
    parts = given(total_parts if factor_parts is None else factor_parts)
    splits, C = parts.shape[:2]
    R = 1 if factor_parts is None else factor_parts.shape[2]
    coefficient = d_magnitude = None
    if total_parts is not None:
        coefficient, d_magnitude = (empty((C,), torch.float32, parts.device) for _ in range(2))
    strides = (0, 0) if out is None else out.stride()
    config = combine_config(R)
    launch(
        _combine_kernel,
        (cdiv(C, config["BLOCK_SIZE_C"]), cdiv(R, config["BLOCK_SIZE_R"])),
        (factor_parts, total_parts, scale, norm, magnitude, out, coefficient, d_magnitude),
        splits=splits, C=C,
        stride_fc=strides[0], stride_fr=strides[1],
        multiplier=multiplier, eps=eps, stand_in=stand_in,
        R=R, HAS_FACTOR=factor_parts is not None, HAS_TOTAL=total_parts is not None, HAS_SCALE=scale is not None,
        **config, **overlapping(parts.get_device()),
    )  # fmt: skip
    return coefficient, d_magnitude
