"""The passes over tokens that meet the low-rank factors.

``project``     folds a scale into a token matrix and projects it onto a factor, in one read:
                t_scaled = t⊙scale          projection = s·(drop(t)⊙scale)·factorᵀ
                t = x gives u, t = dy gives v: (1) and (3) of ``ops.torch_backend``
                in parts for each split of the columns, which ``tail`` adds
``reduce``      sums over tokens, in one read of t and other:
                d_factor = tᵀ·projection    total = Σ_m t⊙other
                t = dy gives dB and S, t = x gives dA and D: (5) and (6)
                in parts for each split of the tokens, which ``combine`` adds

At larger ranks they are the passes of ``wide`` where the hardware has what those need.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import (
    any_set,
    dot_split,
    keep_mask,
    load_matrix,
    load_vector,
    round_with_dither,
)
from .config import (
    cdiv,
    is_aligned,
    is_half,
    is_packed,
    project_config,
    reduce_config,
    target,
)
from .gemm import fits_descriptor
from .overlap import overlapping, wait_for_last
from .wide import project_wide, reduce_wide
from .wide_config import has_wide, project_wide_config, reduce_wide_config


@triton.jit
def _project_kernel(
    t_ptr,  # [M, C]
    scale_ptr,  # [C]
    factor_ptr,  # [R, C]
    scaled_ptr,  # [M, C], contiguous
    projection_ptr,  # [parts, M, R], contiguous: one part for each split of C
    rounded_ptr,  # [parts, M, R], the same of t_scaled; only where lines are cancelled
    word_ptr,  # [2]: not 0 where they are
    seed_ptr,  # [1]
    M, C, split_size,
    stride_tm, stride_tc, stride_fr, stride_fc,
    scaling, dropout_p,
    R: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    PACKED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ROUNDED: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    if PACKED:
        stride_fc = R
    if HAS_ROUNDED:
        word = any_set(word_ptr, 2)  # early: nobody waits for it
    offs_m = tl.program_id(0) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    pid_r, part = tl.program_id(1), tl.program_id(2)
    offs_r = pid_r * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    scaled_ptrs = scaled_ptr + offs_m.to(tl.int64)[:, None] * C
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_R), dtype=tl.float32)
    end = tl.minimum((part + 1) * split_size, C)
    for c in range(part * split_size, end, BLOCK_SIZE_C):
        offs_c = c + tl.arange(0, BLOCK_SIZE_C)
        t = load_matrix(t_ptr, offs_m, offs_c, M, C, stride_tm, stride_tc)  # [BLOCK_SIZE_M, BLOCK_SIZE_C]
        factor = load_matrix(factor_ptr, offs_c, offs_r, C, R, stride_fc, stride_fr).to(tl.float32)
        if HAS_SCALE:
            scale = load_vector(scale_ptr, offs_c, C)
            factor *= scale[:, None]
            if pid_r == 0:
                scaled = round_with_dither(t.to(tl.float32) * scale[None, :], offs_m, offs_c, t.dtype)
                mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
                tl.store(scaled_ptrs + offs_c[None, :], scaled, mask=mask)
        if HAS_DROPOUT:
            keep = keep_mask(tl.load(seed_ptr), offs_m, offs_c, dropout_p)
            t = tl.where(keep, t, tl.zeros_like(t))
        acc = dot_split(t, factor, acc, PRECISION)
    ptrs = projection_ptr + (part.to(tl.int64) * M + offs_m)[:, None] * R + offs_r[None, :]
    tl.store(ptrs, acc * scaling, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
    if HAS_ROUNDED:
        if word:
            acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_R), dtype=tl.float32)
            for c in tl.range(part * split_size, end, 16, num_stages=1):  # rare: few registers
                offs_c = c + tl.arange(0, 16)
                t = load_matrix(t_ptr, offs_m, offs_c, M, C, stride_tm, stride_tc)
                scale = load_vector(scale_ptr, offs_c, C)
                scaled = round_with_dither(t.to(tl.float32) * scale[None, :], offs_m, offs_c, t.dtype)
                factor = load_matrix(factor_ptr, offs_c, offs_r, C, R, stride_fc, stride_fr).to(tl.float32)
                acc = dot_split(scaled, factor, acc, PRECISION)
            ptrs = rounded_ptr + (part.to(tl.int64) * M + offs_m)[:, None] * R + offs_r[None, :]
            tl.store(ptrs, acc * scaling, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])


@triton.jit
def _reduce_kernel(
    t_ptr,  # [M, C]
    other_ptr,  # [M, C]
    projection_ptr,  # [M, R], contiguous
    factor_parts_ptr,  # [splits, C, R]
    total_parts_ptr,  # [splits, C]
    word_ptr,  # [2]: not 0 where lines are cancelled
    seed_ptr,  # [1]
    M, C, split_size,
    stride_tm, stride_tc, stride_om, stride_oc,
    dropout_p,
    R: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_WORD: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    if HAS_FACTOR and HAS_WORD:
        word = any_set(word_ptr, 2)  # early: nobody waits for it
    offs_c = tl.program_id(0) * BLOCK_SIZE_C + tl.arange(0, BLOCK_SIZE_C)
    split = tl.program_id(1)
    pid_r = tl.program_id(2)
    offs_r = pid_r * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    mask_c = offs_c < C
    end = tl.minimum((split + 1) * split_size, M)
    acc = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), dtype=tl.float32)
    total = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_C), dtype=tl.float32)  # summed over tokens once, after the loop
    for m in range(split * split_size, end, BLOCK_SIZE_M):
        offs_m = m + tl.arange(0, BLOCK_SIZE_M)
        t = load_matrix(t_ptr, offs_m, offs_c, end, C, stride_tm, stride_tc)  # [BLOCK_SIZE_M, BLOCK_SIZE_C]
        if HAS_TOTAL:
            other = load_matrix(other_ptr, offs_m, offs_c, end, C, stride_om, stride_oc)
            total += t.to(tl.float32) * other.to(tl.float32)
        if HAS_FACTOR:
            if HAS_DROPOUT:
                keep = keep_mask(tl.load(seed_ptr), offs_m, offs_c, dropout_p)
                t = tl.where(keep, t, tl.zeros_like(t))
            projection = load_matrix(projection_ptr, offs_m, offs_r, end, R, R, 1).to(t.dtype)
            acc = tl.dot(tl.trans(t), projection, acc, input_precision=PRECISION)
    base = split.to(tl.int64) * C + offs_c
    if HAS_TOTAL:
        if pid_r == 0:  # a branch: Triton 3.9's interpreter takes no mask of a block and a scalar
            tl.store(total_parts_ptr + base, tl.sum(total, axis=0), mask=mask_c)
    if HAS_FACTOR:
        if HAS_WORD:
            if word:
                acc = add_low_term(
                    acc, t_ptr, projection_ptr, offs_c, offs_r, split * split_size, end, C, stride_tm, stride_tc,
                    R, PRECISION,
                )  # fmt: skip
        ptrs = factor_parts_ptr + base[:, None] * R + offs_r[None, :]
        tl.store(ptrs, acc, mask=mask_c[:, None] & (offs_r < R)[None, :])


@triton.jit
def add_low_term(
    acc, t_ptr, projection_ptr, offs_c, offs_r, start, end, C, stride_tm, stride_tc,
    R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + tᵀ·(what the projection lost when it was rounded), over the tokens from start to end.

    A cancelled line has most of d_factor to itself: no other averages what rounding takes of it.
    """
    for m in tl.range(start, end, 16, num_stages=1):  # rare: few registers
        offs_m = m + tl.arange(0, 16)
        t = load_matrix(t_ptr, offs_m, offs_c, end, C, stride_tm, stride_tc)
        projection = load_matrix(projection_ptr, offs_m, offs_r, end, R, R, 1)
        low = (projection - projection.to(t.dtype).to(tl.float32)).to(t.dtype)
        acc = tl.dot(tl.trans(t), low, acc, input_precision=PRECISION)
    return acc


def project(
    t: Tensor,
    factor: Tensor,
    scale: Tensor | None,
    word: Tensor | None,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """t⊙scale [M, C] rounded with dither (t itself without a scale), and s·(drop(t)⊙scale)·factorᵀ.

    The latter is float32 [M, R], or [parts, M, R] for as many splits of C, which ``tail`` adds. The third is the same
    of the rounded t⊙scale, where there is ``word`` of cancelled lines; None where the two cannot differ.

    Kept elements are scaled by 1 / (1 − p), which ``scaling`` takes along.
    """
    (M, C), R = t.shape, factor.shape[0]
    arch, processors = target(t.get_device())
    if has_wide(arch, R, t.dtype, fits_descriptor(t), seed is not None):
        parts, config = project_wide_config(arch, processors, M, C, R)
        return project_wide(t, factor, scale, word, scaling=scaling, precision=precision, parts=parts, config=config)
    parts, config = project_config(arch, processors, M, C, R, t.dtype, is_aligned(t), seed is not None)
    scaled = empty((M, C), t.dtype, t.device) if scale is not None else t
    shape = (parts, M, R) if parts > 1 else (M, R)
    projection = empty(shape, torch.float32, t.device)
    differs = word is not None and scale is not None and is_half(t.dtype)
    rounded = empty(shape, torch.float32, t.device) if differs else None
    block_c = config["BLOCK_SIZE_C"]
    launch(
        _project_kernel,
        (cdiv(M, config["BLOCK_SIZE_M"]), cdiv(R, config["BLOCK_SIZE_R"]), parts),
        (t, scale, factor, scaled, projection, rounded, word, seed),
        M=M, C=C, split_size=cdiv(cdiv(C, parts), block_c) * block_c,
        stride_tm=t.stride(0), stride_tc=t.stride(1), stride_fr=factor.stride(0), stride_fc=factor.stride(1),
        scaling=scaling / (1.0 - dropout_p), dropout_p=dropout_p,
        R=R, PACKED=is_packed(factor.T), HAS_SCALE=scale is not None, HAS_ROUNDED=differs,
        HAS_DROPOUT=seed is not None,
        PRECISION=precision, **config, **overlapping(t.get_device(), early=False),
    )  # fmt: skip
    return scaled, projection, rounded


def reduce(
    t: Tensor,
    other: Tensor | None,
    projection: Tensor | None,
    word: Tensor | None,
    seed: Tensor | None,
    *,
    dropout_p: float,
    precision: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Parts of tᵀ·projection [splits, C, R] and of Σ_m t⊙other [splits, C], one for each split of the tokens.

    Where there is ``word`` of cancelled lines, a half-precision product takes the projection in two terms.
    """
    M, C = t.shape
    R = 1 if projection is None else projection.shape[1]
    arch, processors = target(t.get_device())
    if projection is not None and has_wide(arch, R, t.dtype, fits_descriptor(t), seed is not None):
        wide = reduce_wide_config(arch, processors, M, C, R)
        if wide is not None:
            return reduce_wide(t, other, projection, word, splits=wide[0], config=wide[1])
    splits, config = reduce_config(arch, processors, M, C, R, t.dtype, is_aligned(t), seed is not None)
    factor_parts = None if projection is None else empty((splits, C, R), torch.float32, t.device)
    total_parts = None if other is None else empty((splits, C), torch.float32, t.device)
    other_strides = (0, 0) if other is None else other.stride()
    launch(
        _reduce_kernel,
        (cdiv(C, config["BLOCK_SIZE_C"]), splits, cdiv(R, config["BLOCK_SIZE_R"])),
        (t, other, projection, factor_parts, total_parts, word, seed),
        M=M, C=C, split_size=cdiv(cdiv(M, splits), config["BLOCK_SIZE_M"]) * config["BLOCK_SIZE_M"],
        stride_tm=t.stride(0), stride_tc=t.stride(1), stride_om=other_strides[0], stride_oc=other_strides[1],
        dropout_p=dropout_p,
        R=R, HAS_FACTOR=projection is not None, HAS_TOTAL=other is not None,
        HAS_WORD=word is not None and is_half(t.dtype), HAS_DROPOUT=seed is not None,
        PRECISION=precision, **config, **overlapping(t.get_device(), early=False),
    )  # fmt: skip
    return factor_parts, total_parts
