"""The low-rank product as more columns of the base product, for operands that descriptors address (``gemm``).

A half-precision product takes projection·factor in three terms, of what rounding makes of each (high) and leaves (low):

    projection·factor = high·high + high·low + low·high + …

The second keeps small updates of the factor. The third is for lines of W0 that the update cancels, where the base
product and this one are nearly opposite. There the projection is that of the rounded operand, which W0 meets too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import choose, load_matrix, load_projection
from .config import TRITON_DTYPES, cdiv, is_half, split_config


@triton.jit
def _tail_kernel(
    projection_ptr,  # [PARTS, M, R], contiguous
    rounded_ptr,  # [PARTS, M, R]: what stands for it where lines are cancelled
    word_ptr,  # [2]: not 0 where lines are
    factor_ptr,  # [R, O]
    t_tail_ptr,  # [M, TERMS·R]
    w_tail_ptr,  # [O, TERMS·R]
    M, O,
    stride_fr, stride_fo, stride_tm, stride_wo, stride_wr,
    R: tl.constexpr, PARTS: tl.constexpr, TERMS: tl.constexpr, HAS_ROUNDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    pid, num_blocks_m = tl.program_id(0), tl.cdiv(M, BLOCK_SIZE)
    offs_r = tl.program_id(1) * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    if pid < num_blocks_m:
        offs_m = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        if HAS_ROUNDED:
            projection_ptr = choose(word_ptr, rounded_ptr, projection_ptr)
        projection = load_projection(projection_ptr, offs_m, offs_r, M, M, R, PARTS)
        high, low = _split(projection, DTYPE)
        for term in tl.static_range(TERMS):
            _store(t_tail_ptr, low if term == 2 else high, offs_m, offs_r, M, stride_tm, 1, term, R)
    else:
        offs_o = (pid - num_blocks_m) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        factor = load_matrix(factor_ptr, offs_o, offs_r, O, R, stride_fo, stride_fr).to(tl.float32)
        high, low = _split(factor, DTYPE)
        for term in tl.static_range(TERMS):
            _store(w_tail_ptr, low if term == 1 else high, offs_o, offs_r, O, stride_wo, stride_wr, term, R)


@triton.jit
def _split(values, DTYPE: tl.constexpr):
    high = values.to(DTYPE)
    return high, (values - high.to(tl.float32)).to(DTYPE)


@triton.jit
def _store(ptr, values, offs_i, offs_r, size_i, stride_i, stride_r, term: tl.constexpr, R: tl.constexpr):
    """As the columns of one term."""
    mask = (offs_i < size_i)[:, None] & (offs_r < R)[None, :]
    columns = (term * R + offs_r).to(tl.int64)
    tl.store(ptr + offs_i.to(tl.int64)[:, None] * stride_i + columns[None, :] * stride_r, values, mask=mask)


def split_low_rank(
    projection: Tensor,
    rounded: Tensor | None,
    factor: Tensor,
    word: Tensor | None,
    parts: int,
    dtype: torch.dtype,
    rows_are_outputs: bool,
) -> tuple[Tensor, Tensor]:
    """Tails [M, T] and [O, T] of the inner dimension, whose product is projection·factor; the second is stored as
    [T, O] unless ``rows_are_outputs``.

    T = R in float32, and 2R in half precision, or 3R with ``word`` of cancelled lines, of whatever it says.
    """
    (_, M, R), O = projection.shape, factor.shape[1]
    terms = 2 + (word is not None) if is_half(dtype) else 1
    t_tail = _aligned_rows(M, terms * R, dtype, factor.device)
    w_tail = _aligned_rows(*((O, terms * R) if rows_are_outputs else (terms * R, O)), dtype, factor.device)
    strides_w = w_tail.stride() if rows_are_outputs else w_tail.stride()[::-1]
    config = split_config(R)
    block = config["BLOCK_SIZE"]
    launch(
        _tail_kernel,
        (cdiv(M, block) + cdiv(O, block), cdiv(R, config["BLOCK_SIZE_R"])),
        (projection, rounded, word, factor, t_tail, w_tail),
        M=M, O=O,
        stride_fr=factor.stride(0), stride_fo=factor.stride(1), stride_tm=t_tail.stride(0),
        stride_wo=strides_w[0], stride_wr=strides_w[1],
        R=R, PARTS=parts, TERMS=terms, HAS_ROUNDED=rounded is not None, DTYPE=TRITON_DTYPES[dtype], **config,
    )  # fmt: skip
    return t_tail, w_tail


def _aligned_rows(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized [rows, cols] whose rows start at multiples of 16 bytes."""
    return empty((rows, cdiv(cols, 8) * 8), dtype, device)[:, :cols]
