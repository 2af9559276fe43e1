"""The first launch of a mixed batch: x⊙g and u, every token with its own adapter; see ``mixed``.

    (1) u_t = (x_t⊙g_i)·A_iᵀ

x⊙g is rounded with dither, which depends on a token's place in the batch, not on the adapters of others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Slots
from ..replay.recording import empty, launch
from .common import dot_split, load_matrix, load_vector, round_with_dither
from .config import cdiv, is_aligned, target
from .mixed_config import mixed_project_config, mixed_project_few_config


@triton.jit
def look_up(index_ptr, offs_m, M, entries, tokens):
    """Of tokens by their places in the order of the slots: where they stand in the batch, slots and groups."""
    entry = offs_m // tokens
    mask = offs_m < M
    rows = tl.load(index_ptr + entry, mask=mask, other=0).to(tl.int64) * tokens + offs_m % tokens
    slots = tl.load(index_ptr + entries + entry, mask=mask, other=0).to(tl.int64)
    groups = tl.load(index_ptr + 2 * entries + entry, mask=mask, other=-1)
    return rows, slots, groups


@triton.jit
def groups_of_tile(index_ptr, start_m, end_m, M, entries, tokens):
    """The first and the last group of a tile's tokens."""
    first = tl.load(index_ptr + 2 * entries + start_m // tokens)
    return first, tl.load(index_ptr + 2 * entries + (tl.minimum(end_m, M) - 1) // tokens)


@triton.jit
def is_alone(index_ptr, entries):
    """Whether all tokens have one adapter: the last of the groups is the first."""
    return tl.load(index_ptr + 3 * entries - 1) == 0


@triton.jit
def add_product(t, factor, acc, PRECISION: tl.constexpr):
    """acc + t·factor, with a factor of t's dtype as it is."""
    if t.dtype == factor.dtype:
        return tl.dot(t, factor, acc, input_precision=PRECISION)
    return dot_split(t, factor.to(tl.float32), acc, PRECISION)


@triton.jit
def _project_few_kernel(
    x_ptr,  # [M, K]
    index_ptr,  # [4, entries], contiguous
    col_scale_ptr,  # [slots, K], contiguous
    lora_A_ptr,  # [slots, R, K], contiguous
    scaled_ptr,  # [M, K], contiguous, in the order of the slots
    projection_ptr,  # [parts, M, R], contiguous, in that order: one part for each split of K
    counter_ptr,  # [counters], or None
    M, K, entries, tokens, split_size, counters,
    stride_xm, stride_xk,
    R: tl.constexpr,
    BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr, COUNTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program for a token, a split of K and some ranks.

    It sets the counters that the next launch needs to zero, or, without them, leaves out u of one adapter alone.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    m, part, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    makes_u = True
    if COUNTS:
        if (m == 0) & (part == 0) & (pid_r == 0):
            for start in range(0, counters, 1024):
                offs = start + tl.arange(0, 1024)
                tl.store(counter_ptr + offs, tl.zeros((1024,), tl.int32), mask=offs < counters)
    else:
        makes_u = not is_alone(index_ptr, entries)
    row = tl.load(index_ptr + m // tokens).to(tl.int64) * tokens + m % tokens
    slot = tl.load(index_ptr + entries + m // tokens).to(tl.int64)
    offs_r = pid_r * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    acc = tl.zeros((BLOCK_SIZE_R, BLOCK_SIZE_C), dtype=tl.float32)
    end = tl.minimum((part + 1) * split_size, K)
    for k in range(part * split_size, end, BLOCK_SIZE_C):
        offs_k = k + tl.arange(0, BLOCK_SIZE_C)
        mask_k = offs_k < K
        x = tl.load(x_ptr + row * stride_xm + offs_k.to(tl.int64) * stride_xk, mask=mask_k, other=0.0)
        scaled = x.to(tl.float32) * load_vector(col_scale_ptr + slot * K, offs_k, K)
        if makes_u:
            factor = load_matrix(lora_A_ptr + slot * R * K, offs_r, offs_k, R, K, K, 1).to(tl.float32)
            acc += factor * scaled[None, :]
        if pid_r == 0:
            one = tl.arange(0, 1)
            rounded = round_with_dither(scaled[None, :], row + one, offs_k, x.dtype)
            ptrs = scaled_ptr + (tl.full((), m, tl.int64) * K + one)[:, None] + offs_k[None, :]
            tl.store(ptrs, rounded, mask=mask_k[None, :])
    if makes_u:
        ptrs = projection_ptr + (part.to(tl.int64) * M + m) * R + offs_r
        tl.store(ptrs, tl.sum(acc, axis=1), mask=offs_r < R)  # (1)


@triton.jit
def _project_many_kernel(
    x_ptr,  # [M, K]
    index_ptr,  # [4, entries], contiguous
    col_scale_ptr,  # [slots, K], contiguous
    lora_A_ptr,  # [slots, R, K], contiguous
    scaled_ptr,  # [M, K], contiguous, in the order of the slots
    projection_ptr,  # [parts, M, R], contiguous, in that order: one part for each split of K
    M, K, entries, tokens, split_size,
    stride_xm, stride_xk,
    R: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for a tile of tokens, a split of K and some ranks; it reads the tile once for each group there."""
    start_m, part, pid_r = tl.program_id(0) * BLOCK_SIZE_M, tl.program_id(1), tl.program_id(2)
    offs_m = start_m + tl.arange(0, BLOCK_SIZE_M)
    mask_m = offs_m < M
    rows, _, groups = look_up(index_ptr, offs_m, M, entries, tokens)
    first, last = groups_of_tile(index_ptr, start_m, start_m + BLOCK_SIZE_M, M, entries, tokens)
    offs_r = pid_r * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_R), dtype=tl.float32)
    end = tl.minimum((part + 1) * split_size, K)
    for group in range(first, last + 1):
        mine = groups == group
        slot = tl.load(index_ptr + 3 * entries + group).to(tl.int64)
        for k in range(part * split_size, end, BLOCK_SIZE_C):
            offs_k = k + tl.arange(0, BLOCK_SIZE_C)
            mask = mine[:, None] & (offs_k < K)[None, :]
            ptrs = x_ptr + rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
            x = tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_SIZE_M, BLOCK_SIZE_C], zero where of another group
            scale = load_vector(col_scale_ptr + slot * K, offs_k, K)
            factor = load_matrix(lora_A_ptr + slot * R * K, offs_r, offs_k, R, K, K, 1)
            scaled = round_with_dither(x.to(tl.float32) * scale[None, :], rows, offs_k, x.dtype)
            if pid_r == 0:
                tl.store(scaled_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :], scaled, mask=mask)
            acc = add_product(scaled, tl.trans(factor), acc, PRECISION)
    ptrs = projection_ptr + (part.to(tl.int64) * M + offs_m)[:, None] * R + offs_r[None, :]
    tl.store(ptrs, acc, mask=mask_m[:, None] & (offs_r < R)[None, :])  # (1)


def project_few(
    x: Tensor, index: Tensor, slots: Slots, scaled: Tensor, counter: Tensor | None, *, tokens: int, overlap: bool
) -> Tensor:
    """u in parts [parts, M, R] and x⊙g, into scaled [M, K], in the order of the slots; sets the counter to zero.

    Without a counter u of a batch that has one adapter alone is left out. With ``overlap`` the next launch may begin.
    """
    (M, K), R = x.shape, slots.lora_A.shape[1]
    parts, config = mixed_project_few_config(M, K, R, slots.lora_A.dtype)
    projection = empty((parts, M, R), torch.float32, x.device)
    launch(
        _project_few_kernel,
        (M, parts, cdiv(R, config["BLOCK_SIZE_R"])),
        (x, index, slots.col_scale, slots.lora_A, scaled, projection, counter),
        M=M, K=K, entries=index.shape[1], tokens=tokens, split_size=split_of(K, parts, config),
        counters=0 if counter is None else len(counter), stride_xm=x.stride(0), stride_xk=x.stride(1),
        R=R, COUNTS=counter is not None, OVERLAP=overlap, **config,
    )  # fmt: skip
    return projection


def project_many(x: Tensor, index: Tensor, slots: Slots, scaled: Tensor, *, tokens: int, precision: str) -> Tensor:
    """The same for many tokens."""
    (M, K), R = x.shape, slots.lora_A.shape[1]
    arch, processors = target(x.get_device())
    parts, config = mixed_project_config(arch, processors, M, K, R, x.dtype, is_aligned(x))
    projection = empty((parts, M, R), torch.float32, x.device)
    launch(
        _project_many_kernel,
        (cdiv(M, config["BLOCK_SIZE_M"]), parts, cdiv(R, config["BLOCK_SIZE_R"])),
        (x, index, slots.col_scale, slots.lora_A, scaled, projection),
        M=M, K=K, entries=index.shape[1], tokens=tokens, split_size=split_of(K, parts, config),
        stride_xm=x.stride(0), stride_xk=x.stride(1),
        R=R, PRECISION=precision, **config,
    )  # fmt: skip
    return projection


def split_of(size: int, splits: int, config: dict) -> int:
    """Columns of a split, whole blocks of them."""
    return cdiv(cdiv(size, splits), config["BLOCK_SIZE_C"]) * config["BLOCK_SIZE_C"]
