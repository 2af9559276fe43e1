"""The end of a backward of layers that read one x, in one read of x and of each layer's gradient of it.

dx = Σ_i dx_i        xᵀ·v_i        D_i = Σ_m x⊙dx_i

for two or three layers: (5) and (6) of ``ops.torch_backend``, in parts for each split of the tokens, which ``combine``
adds. dx is added in float32 and rounded once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import add_product, load_matrix, word_of
from .config import cdiv, is_aligned, is_half, target
from .joint_config import shared_sums_config
from .low_rank import add_low_term
from .overlap import overlapping, wait_for_last


@triton.jit
def _shared_sums_kernel(
    x_ptr,  # [M, C]
    dx_0_ptr,  # [M, C], contiguous, as are the others; read and then written over: Σ dx_i
    dx_1_ptr,  # [M, C]
    dx_2_ptr,  # [M, C], of the third layer, if there is one
    projection_0_ptr,  # [M, R_0], contiguous, as are the others
    projection_1_ptr,  # [M, R_1]
    projection_2_ptr,  # [M, R_2]
    factor_0_ptr,  # [splits, C, R_0]
    factor_1_ptr,  # [splits, C, R_1]
    factor_2_ptr,  # [splits, C, R_2]
    total_0_ptr,  # [splits, C]
    total_1_ptr,  # [splits, C]
    total_2_ptr,  # [splits, C]
    word_0_ptr,  # [2]: not 0 where lines of the layer are cancelled
    word_1_ptr,  # [2]
    word_2_ptr,  # [2]
    M, C, split_size,
    stride_xm, stride_xc,
    R_0: tl.constexpr, R_1: tl.constexpr, R_2: tl.constexpr,  # 0 where there is no product
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_THIRD: tl.constexpr,
    HAS_TOTAL_0: tl.constexpr, HAS_TOTAL_1: tl.constexpr, HAS_TOTAL_2: tl.constexpr,
    HAS_WORD_0: tl.constexpr, HAS_WORD_1: tl.constexpr, HAS_WORD_2: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    offs_c, split = tl.program_id(0) * BLOCK_SIZE_C + tl.arange(0, BLOCK_SIZE_C), tl.program_id(1)
    start, end = split * split_size, tl.minimum((split + 1) * split_size, M)
    word_0 = word_of(word_0_ptr, HAS_WORD_0)  # early: nobody waits for it
    word_1 = word_of(word_1_ptr, HAS_WORD_1)
    word_2 = word_of(word_2_ptr, HAS_WORD_2)
    factor_0 = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), dtype=tl.float32)
    factor_1 = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), dtype=tl.float32)
    factor_2 = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), dtype=tl.float32)
    total_0 = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_C), dtype=tl.float32)  # summed over tokens once, after the loop
    total_1 = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_C), dtype=tl.float32)
    total_2 = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_C), dtype=tl.float32)
    for m in range(start, end, BLOCK_SIZE_M):
        offs_m = m + tl.arange(0, BLOCK_SIZE_M)
        x = load_matrix(x_ptr, offs_m, offs_c, end, C, stride_xm, stride_xc)  # [BLOCK_SIZE_M, BLOCK_SIZE_C]
        wide_x = x.to(tl.float32)
        dx = load_matrix(dx_0_ptr, offs_m, offs_c, end, C, C, 1).to(tl.float32)
        if HAS_TOTAL_0:
            total_0 += wide_x * dx
        other = load_matrix(dx_1_ptr, offs_m, offs_c, end, C, C, 1).to(tl.float32)
        if HAS_TOTAL_1:
            total_1 += wide_x * other
        dx += other
        if HAS_THIRD:
            other = load_matrix(dx_2_ptr, offs_m, offs_c, end, C, C, 1).to(tl.float32)
            if HAS_TOTAL_2:
                total_2 += wide_x * other
            dx += other
        ptrs = dx_0_ptr + offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
        tl.store(ptrs, dx.to(x.dtype), mask=(offs_m < end)[:, None] & (offs_c < C)[None, :])
        factor_0 = add_product(factor_0, x, projection_0_ptr, offs_m, end, R_0, PRECISION)
        factor_1 = add_product(factor_1, x, projection_1_ptr, offs_m, end, R_1, PRECISION)
        factor_2 = add_product(factor_2, x, projection_2_ptr, offs_m, end, R_2, PRECISION)
    base = split.to(tl.int64) * C + offs_c
    _store(
        factor_0_ptr, total_0_ptr, factor_0, total_0, x_ptr, projection_0_ptr, word_0, base, offs_c, start, end, C,
        stride_xm, stride_xc, R_0, HAS_TOTAL_0, HAS_WORD_0, PRECISION,
    )  # fmt: skip
    _store(
        factor_1_ptr, total_1_ptr, factor_1, total_1, x_ptr, projection_1_ptr, word_1, base, offs_c, start, end, C,
        stride_xm, stride_xc, R_1, HAS_TOTAL_1, HAS_WORD_1, PRECISION,
    )  # fmt: skip
    _store(
        factor_2_ptr, total_2_ptr, factor_2, total_2, x_ptr, projection_2_ptr, word_2, base, offs_c, start, end, C,
        stride_xm, stride_xc, R_2, HAS_TOTAL_2, HAS_WORD_2, PRECISION,
    )  # fmt: skip


@triton.jit
def _store(
    factor_ptr, total_ptr, factor, total, x_ptr, projection_ptr, word, base, offs_c, start, end, C,
    stride_xm, stride_xc, R: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_WORD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if HAS_TOTAL:
        tl.store(total_ptr + base, tl.sum(total, axis=0), mask=offs_c < C)
    if R > 0:
        offs_r = tl.arange(0, factor.shape[1])
        if HAS_WORD:
            if word:
                factor = add_low_term(
                    factor, x_ptr, projection_ptr, offs_c, offs_r, start, end, C, stride_xm, stride_xc, R, PRECISION
                )
        mask = (offs_c < C)[:, None] & (offs_r < R)[None, :]
        tl.store(factor_ptr + base[:, None] * R + offs_r[None, :], factor, mask=mask)


class Share(NamedTuple):
    """What one of the layers adds."""

    dx: Tensor  # [M, C], contiguous: its gradient of x
    v: Tensor | None  # [M, R], for dA
    total: bool  # whether D is needed
    word: Tensor | None  # of cancelled lines: dA takes v in two terms


def shared_sums(
    x: Tensor, shares: list[Share], *, precision: str
) -> tuple[Tensor, list[tuple[Tensor | None, Tensor | None]]]:
    """dx, written over the first share's, and of each share parts of xᵀ·v [splits, C, R] and of D [splits, C].

    Two shares or three; ranks up to ``joint_config.joint_rank``, without dropout.
    """
    M, C = x.shape
    arch, processors = target(x.get_device())
    every = [*shares, Share(None, None, False, None)][:3]  # type: ignore[arg-type]
    ranks = [0 if share.v is None else share.v.shape[1] for share in every]
    splits, config = shared_sums_config(arch, processors, M, C, max(1, *ranks), x.dtype, is_aligned(x), len(shares))
    factors = [None if R == 0 else empty((splits, C, R), torch.float32, x.device) for R in ranks]
    totals = [empty((splits, C), torch.float32, x.device) if share.total else None for share in every]
    words = [share.word if is_half(x.dtype) and share.v is not None else None for share in every]
    block_m = config["BLOCK_SIZE_M"]
    launch(
        _shared_sums_kernel,
        (cdiv(C, config["BLOCK_SIZE_C"]), splits),
        (x, *[share.dx for share in every], *[share.v for share in every], *factors, *totals, *words),
        M=M, C=C, split_size=cdiv(cdiv(M, splits), block_m) * block_m,
        stride_xm=x.stride(0), stride_xc=x.stride(1),
        R_0=ranks[0], R_1=ranks[1], R_2=ranks[2], HAS_THIRD=len(shares) == 3,
        HAS_TOTAL_0=totals[0] is not None, HAS_TOTAL_1=totals[1] is not None, HAS_TOTAL_2=totals[2] is not None,
        HAS_WORD_0=words[0] is not None, HAS_WORD_1=words[1] is not None, HAS_WORD_2=words[2] is not None,
        PRECISION=precision, **config, **overlapping(x.get_device(), early=False),
    )  # fmt: skip
    return shares[0].dx, list(zip(factors, totals, strict=True))[: len(shares)]
