"""The end of a projection: its parts added, and the low-rank product as more columns of the base product.

The columns are for operands that descriptors address (``gemm``), and made in the same launch.

A half-precision product takes projection·factor in three terms, of what rounding makes of each (high) and leaves (low):

    projection·factor = high·high + high·low + low·high + …

The second keeps small updates of the factor; one in the product's own dtype has none, and the term is left out. The
third is for lines of W0 that the update cancels, where the base product and this one are nearly opposite. There the
projection is that of the rounded operand, which W0 meets too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import any_set, choose, load_matrix, sum_parts
from .config import TRITON_DTYPES, cdiv, is_half, split_config
from .overlap import overlapping, wait_for_last


@triton.jit
def _tail_kernel(
    parts_ptr,  # [parts, M, R], contiguous
    rounded_parts_ptr,  # [parts, M, R]: what stands for it where lines are cancelled
    projection_ptr,  # [M, R]: the sum of parts
    rounded_ptr,  # [M, R]: the same of rounded_parts, where there are no tails
    word_ptr,  # [2]: not 0 where lines are
    factor_ptr,  # [R, O]
    t_tail_ptr,  # [M, TERMS·R]
    w_tail_ptr,  # [O, TERMS·R]
    parts, M, O,
    stride_fr, stride_fo, stride_tm, stride_wo, stride_wr,
    R: tl.constexpr, TERMS: tl.constexpr, EXACT: tl.constexpr,  # whether factor is high and no more
    HAS_PARTS: tl.constexpr, HAS_ROUNDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    OVERLAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    pid, num_blocks_m = tl.program_id(0), tl.cdiv(M, BLOCK_SIZE)
    offs_r = tl.program_id(1) * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    if pid < num_blocks_m:
        offs_m = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        if HAS_PARTS:
            if HAS_ROUNDED:
                word = any_set(word_ptr, 2)  # early: nobody waits for it
            projection = sum_parts(parts_ptr, M * R, parts, offs_m, offs_r, M, R)
            _store(projection_ptr, projection, offs_m, offs_r, M, R, 1, 0, R)
            if HAS_ROUNDED:
                if word:
                    projection = sum_parts(rounded_parts_ptr, M * R, parts, offs_m, offs_r, M, R)
                    if TERMS == 0:
                        _store(rounded_ptr, projection, offs_m, offs_r, M, R, 1, 0, R)
        else:
            if HAS_ROUNDED:
                parts_ptr = choose(word_ptr, rounded_parts_ptr, parts_ptr)
            projection = load_matrix(parts_ptr, offs_m, offs_r, M, R, R, 1)
        if TERMS > 0:
            high, low = _split(projection, DTYPE)
            for term in tl.static_range(TERMS):
                _store(t_tail_ptr, low if term + EXACT == 2 else high, offs_m, offs_r, M, stride_tm, 1, term, R)
    elif TERMS > 0:
        offs_o = (pid - num_blocks_m) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        factor = load_matrix(factor_ptr, offs_o, offs_r, O, R, stride_fo, stride_fr).to(tl.float32)
        high, low = _split(factor, DTYPE)
        for term in tl.static_range(TERMS):
            values = low if term == 1 and not EXACT else high
            _store(w_tail_ptr, values, offs_o, offs_r, O, stride_wo, stride_wr, term, R)


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


def add_parts(parts: Tensor, rounded_parts: Tensor | None, word: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Projections [M, R] of what ``project`` leaves; the second only where there is ``word`` of cancelled lines."""
    if parts.dim() == 2:
        return parts, rounded_parts
    projection = empty(parts.shape[1:], torch.float32, parts.device)
    rounded = None if rounded_parts is None else empty(parts.shape[1:], torch.float32, parts.device)
    _finish(parts, rounded_parts, projection, rounded, word, None, None, None, True)
    return projection, rounded


def split_low_rank(
    parts: Tensor,
    rounded_parts: Tensor | None,
    factor: Tensor,
    word: Tensor | None,
    dtype: torch.dtype,
    rows_are_outputs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The projection [M, R], and tails [M, T] and [O, T] of the inner dimension, whose product is projection·factor.

    The second tail is stored as [T, O] unless ``rows_are_outputs``. T = R·``tail_terms``, in half precision R more with
    ``word`` of cancelled lines, of whatever it says.
    """
    (M, R), O = parts.shape[-2:], factor.shape[1]
    terms = tail_terms(factor, dtype) + (word is not None and is_half(dtype))
    t_tail = _aligned_rows(M, terms * R, dtype, factor.device)
    w_tail = _aligned_rows(*((O, terms * R) if rows_are_outputs else (terms * R, O)), dtype, factor.device)
    projection = parts if parts.dim() == 2 else empty((M, R), torch.float32, parts.device)
    _finish(parts, rounded_parts, projection, None, word, factor, t_tail, w_tail, rows_are_outputs)
    return projection, t_tail, w_tail


def tail_terms(factor: Tensor, dtype: torch.dtype) -> int:
    """Of how many terms projection·factor is made where no lines are cancelled."""
    return 2 if is_half(dtype) and factor.dtype != dtype else 1


def _finish(parts, rounded_parts, projection, rounded, word, factor, t_tail, w_tail, rows_are_outputs: bool) -> None:
    M, R = projection.shape
    O, terms, dtype, stride_t = 0, 0, torch.float32, 0
    strides_f = strides_w = (0, 0)
    if t_tail is not None:
        O, terms, dtype, stride_t = factor.shape[1], t_tail.shape[1] // R, t_tail.dtype, t_tail.stride(0)
        strides_f, strides_w = factor.stride(), w_tail.stride() if rows_are_outputs else w_tail.stride()[::-1]
    config = split_config(R)
    block = config["BLOCK_SIZE"]
    launch(
        _tail_kernel,
        (cdiv(M, block) + cdiv(O, block), cdiv(R, config["BLOCK_SIZE_R"])),
        (parts, rounded_parts, projection, rounded, word, factor, t_tail, w_tail),
        parts=1 if parts.dim() == 2 else len(parts), M=M, O=O,
        stride_fr=strides_f[0], stride_fo=strides_f[1], stride_tm=stride_t,
        stride_wo=strides_w[0], stride_wr=strides_w[1],
        R=R, TERMS=terms, EXACT=factor is not None and tail_terms(factor, dtype) == 1,
        HAS_PARTS=parts.dim() == 3, HAS_ROUNDED=rounded_parts is not None,
        DTYPE=TRITON_DTYPES[dtype], **config, **overlapping(parts.get_device()),
    )  # fmt: skip


def _aligned_rows(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized [rows, cols] whose rows start at multiples of 16 bytes."""
    return empty((rows, cdiv(cols, 8) * 8), dtype, device)[:, :cols]
