"""The passes over tokens of ``low_rank`` at larger ranks, in half precision, by tensor descriptors (TMA).

What a loop multiplies it loads as it is: the factor in its two terms, side by side, the projection in its high term
(``terms``). One product for each step, and tiles that nothing else reads: Triton waits for the end of the first of two
products, and of a tile that goes to registers as well it keeps a buffer too few for a product that still runs. So what
a pass does beside its product loads the tile once more, a step ahead, from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import any_set, dot_split, load_matrix, load_vector, round_with_dither
from .config import cdiv
from .gemm import descriptor
from .overlap import overlapping, wait_for_last
from .terms import high_term, terms_of


@triton.jit
def _project_wide_kernel(
    t,  # [M, C]; a tensor descriptor with USE_DESCRIPTORS, as is terms
    terms,  # [C, 2R], in whole groups: scale⊙factor in two terms, side by side for each BLOCK_SIZE_R ranks
    t_ptr,  # [M, C]
    scale_ptr,  # [C]
    factor_ptr,  # [R, C]
    scaled_ptr,  # [M, C], contiguous
    projection_ptr,  # [parts, M, R], contiguous: one part for each split of C
    rounded_ptr,  # [parts, M, R], the same of t_scaled; only where lines are cancelled
    word_ptr,  # [2]: not 0 where they are
    M, C, split_size,
    stride_tm, stride_tc, stride_uc, stride_fr, stride_fc,
    scaling,
    R: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr, SHARE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_ROUNDED: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    if HAS_ROUNDED:
        word = any_set(word_ptr, 2)  # early: nobody waits for it
    pid_r, part = tl.program_id(0), tl.program_id(2)
    start_m, start_r = tl.program_id(1) * BLOCK_SIZE_M, pid_r * BLOCK_SIZE_R
    offs_m, offs_r = start_m + tl.arange(0, BLOCK_SIZE_M), start_r + tl.arange(0, BLOCK_SIZE_R)
    start, end = part * split_size, tl.minimum((part + 1) * split_size, C)
    if HAS_SCALE:  # each group of ranks scales its share of the columns
        own_end = tl.where(pid_r * SHARE < BLOCK_SIZE_C, end, 0)
        scaled_ptrs = scaled_ptr + offs_m.to(tl.int64)[:, None] * C
        next_c = start + pid_r * SHARE + tl.arange(0, SHARE)
        next_t = load_matrix(t_ptr, offs_m, next_c, M, own_end, stride_tm, stride_tc)
        next_scale = load_vector(scale_ptr, next_c, own_end)
    acc = tl.zeros((BLOCK_SIZE_M, 2 * BLOCK_SIZE_R), dtype=tl.float32)
    for c in range(start, end, BLOCK_SIZE_C):
        if USE_DESCRIPTORS:
            tile, pair = t.load([start_m, c]), terms.load([c, 2 * start_r])
        else:
            offs_c, offs_u = c + tl.arange(0, BLOCK_SIZE_C), 2 * start_r + tl.arange(0, 2 * BLOCK_SIZE_R)
            tile = load_matrix(t_ptr, offs_m, offs_c, M, C, stride_tm, stride_tc)
            pair = load_matrix(terms, offs_c, offs_u, C, stride_uc, stride_uc, 1)
        acc = tl.dot(tile, pair, acc)
        if HAS_SCALE:
            own_c, own_t, scale = next_c, next_t, next_scale
            next_c += BLOCK_SIZE_C
            next_t = load_matrix(t_ptr, offs_m, next_c, M, own_end, stride_tm, stride_tc)
            next_scale = load_vector(scale_ptr, next_c, own_end)
            scaled = round_with_dither(own_t.to(tl.float32) * scale[None, :], offs_m, own_c, own_t.dtype)
            tl.store(scaled_ptrs + own_c[None, :], scaled, mask=(offs_m < M)[:, None] & (own_c < own_end)[None, :])
    high, low = tl.split(tl.permute(tl.reshape(acc, (BLOCK_SIZE_M, 2, BLOCK_SIZE_R)), (0, 2, 1)))
    rows = (part.to(tl.int64) * M + offs_m)[:, None] * R
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    tl.store(projection_ptr + rows + offs_r[None, :], (high + low) * scaling, mask=mask)
    if HAS_ROUNDED:
        if word:
            for r in tl.range(0, BLOCK_SIZE_R, 32, num_stages=1):  # rare: few registers
                offs_q = start_r + r + tl.arange(0, 32)
                few = tl.zeros((BLOCK_SIZE_M, 32), dtype=tl.float32)
                for c in tl.range(start, end, 16, num_stages=1):
                    offs_k = c + tl.arange(0, 16)
                    tile = load_matrix(t_ptr, offs_m, offs_k, M, C, stride_tm, stride_tc)
                    scale_k = load_vector(scale_ptr, offs_k, C)
                    rounded = round_with_dither(tile.to(tl.float32) * scale_k[None, :], offs_m, offs_k, tile.dtype)
                    factor = load_matrix(factor_ptr, offs_k, offs_q, C, R, stride_fc, stride_fr).to(tl.float32)
                    few = dot_split(rounded, factor, few, PRECISION)
                few_ptrs = rounded_ptr + rows + offs_q[None, :]
                tl.store(few_ptrs, few * scaling, mask=(offs_m < M)[:, None] & (offs_q < R)[None, :])


@triton.jit
def _reduce_wide_kernel(
    t,  # [M, C]; a tensor descriptor with USE_DESCRIPTORS, as is high
    high,  # [M, R]: the projection in t's dtype
    t_ptr,  # [M, C]
    other_ptr,  # [M, C]
    projection_ptr,  # [M, R], contiguous
    factor_parts_ptr,  # [splits, C, R]
    total_parts_ptr,  # [splits, C]
    word_ptr,  # [2]: not 0 where lines are cancelled
    M, C, split_size,
    stride_tm, stride_tc, stride_om, stride_oc, stride_hm,
    R: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr, ADDED: tl.constexpr,
    HAS_TOTAL: tl.constexpr, HAS_WORD: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    if HAS_WORD:
        word = any_set(word_ptr, 2)  # early: nobody waits for it
    split, pid_r = tl.program_id(1), tl.program_id(2)
    start_c, start_r = tl.program_id(0) * BLOCK_SIZE_C, pid_r * BLOCK_SIZE_R
    offs_c, offs_r = start_c + tl.arange(0, BLOCK_SIZE_C), start_r + tl.arange(0, BLOCK_SIZE_R)
    start, end = split * split_size, tl.minimum((split + 1) * split_size, M)
    if HAS_TOTAL:
        next_m = start + tl.arange(0, BLOCK_SIZE_M)
        next_t = load_matrix(t_ptr, next_m, offs_c, end, C, stride_tm, stride_tc)
        next_other = load_matrix(other_ptr, next_m, offs_c, end, C, stride_om, stride_oc)
        # ADDED rows that one thread has are added at once, the others after the loop
        total = tl.zeros((BLOCK_SIZE_M // ADDED, BLOCK_SIZE_C), dtype=tl.float32)
    acc = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), dtype=tl.float32)
    for m in range(start, end, BLOCK_SIZE_M):
        if USE_DESCRIPTORS:
            tile, projection = t.load([m, start_c]), high.load([m, start_r])
        else:
            offs_m = m + tl.arange(0, BLOCK_SIZE_M)
            tile = load_matrix(t_ptr, offs_m, offs_c, end, C, stride_tm, stride_tc)
            projection = load_matrix(high, offs_m, offs_r, end, R, stride_hm, 1)
        acc = tl.dot(tl.trans(tile), projection, acc)
        if HAS_TOTAL:
            products = next_t.to(tl.float32) * next_other.to(tl.float32)
            next_m += BLOCK_SIZE_M
            next_t = load_matrix(t_ptr, next_m, offs_c, end, C, stride_tm, stride_tc)
            next_other = load_matrix(other_ptr, next_m, offs_c, end, C, stride_om, stride_oc)
            total += tl.sum(tl.reshape(products, (ADDED, BLOCK_SIZE_M // ADDED, BLOCK_SIZE_C)), axis=0)
    base = split.to(tl.int64) * C + offs_c
    mask_c = offs_c < C
    if HAS_TOTAL:
        if pid_r == 0:  # a branch: Triton 3.9's interpreter takes no mask of a block and a scalar
            tl.store(total_parts_ptr + base, tl.sum(total, axis=0), mask=mask_c)
    if HAS_WORD:  # such a line has most of d_factor to itself: no other averages what rounding takes of it
        if word:
            for m in tl.range(start, end, 16, num_stages=1):  # rare: few registers
                offs_k = m + tl.arange(0, 16)
                tile = load_matrix(t_ptr, offs_k, offs_c, end, C, stride_tm, stride_tc)
                exact = load_matrix(projection_ptr, offs_k, offs_r, end, R, R, 1)
                low = (exact - exact.to(tile.dtype).to(tl.float32)).to(tile.dtype)
                acc = tl.dot(tl.trans(tile), low, acc)
    ptrs = factor_parts_ptr + base[:, None] * R + offs_r[None, :]
    tl.store(ptrs, acc, mask=mask_c[:, None] & (offs_r < R)[None, :])


def project_wide(
    t: Tensor, factor: Tensor, scale: Tensor | None, word: Tensor | None, *,
    scaling: float, precision: str, parts: int, config: dict,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """``low_rank.project`` without dropout, of a t that a descriptor addresses."""
    (M, C), R = t.shape, factor.shape[0]
    block_m, block_c, block_r = (config[f"BLOCK_SIZE_{axis}"] for axis in "MCR")
    groups = cdiv(R, block_r)
    scaled = empty((M, C), t.dtype, t.device) if scale is not None else t
    shape = (parts, M, R) if parts > 1 else (M, R)
    projection = empty(shape, torch.float32, t.device)
    differs = word is not None and scale is not None
    rounded = empty(shape, torch.float32, t.device) if differs else None
    terms = terms_of(factor.T, scale, block_r, t.dtype)
    operands: tuple = (t, terms)
    if config["USE_DESCRIPTORS"]:
        operands = descriptor(t, [block_m, block_c]), descriptor(terms, [block_c, 2 * block_r])
    launch(
        _project_wide_kernel,
        (groups, cdiv(M, block_m), parts),
        (*operands, t, scale, factor, scaled, projection, rounded, word),
        M=M, C=C, split_size=cdiv(cdiv(C, parts), block_c) * block_c,
        stride_tm=t.stride(0), stride_tc=t.stride(1), stride_uc=terms.stride(0),
        stride_fr=factor.stride(0), stride_fc=factor.stride(1),
        scaling=scaling,
        R=R, SHARE=max(16, block_c >> (groups.bit_length() - 1)), HAS_SCALE=scale is not None, HAS_ROUNDED=differs,
        PRECISION=precision, **config, **overlapping(t.get_device(), early=False),
    )  # fmt: skip
    return scaled, projection, rounded


def reduce_wide(
    t: Tensor, other: Tensor | None, projection: Tensor, word: Tensor | None, *, splits: int, config: dict
) -> tuple[Tensor, Tensor | None]:
    """``low_rank.reduce`` with a projection and without dropout, of a t that a descriptor addresses."""
    (M, C), R = t.shape, projection.shape[1]
    block_m, block_c, block_r = (config[f"BLOCK_SIZE_{axis}"] for axis in "MCR")
    factor_parts = empty((splits, C, R), torch.float32, t.device)
    total_parts = None if other is None else empty((splits, C), torch.float32, t.device)
    other_strides = (0, 0) if other is None else other.stride()
    high = high_term(projection, t.dtype)
    operands: tuple = (t, high)
    if config["USE_DESCRIPTORS"]:
        operands = descriptor(t, [block_m, block_c]), descriptor(high, [block_m, block_r])
    launch(
        _reduce_wide_kernel,
        (cdiv(C, block_c), splits, cdiv(R, block_r)),
        (*operands, t, other, projection, factor_parts, total_parts, word),
        M=M, C=C, split_size=cdiv(cdiv(M, splits), block_m) * block_m,
        stride_tm=t.stride(0), stride_tc=t.stride(1), stride_om=other_strides[0], stride_oc=other_strides[1],
        stride_hm=high.stride(0),
        R=R, HAS_TOTAL=other is not None, HAS_WORD=word is not None,
        **config, **overlapping(t.get_device(), early=False),
    )  # fmt: skip
    return factor_parts, total_parts
