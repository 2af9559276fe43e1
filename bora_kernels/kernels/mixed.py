"""A batch of several adapters over one weight, for inference: every token has the adapter of its slot i in a bank.

    (1) u_t = (x_t⊙g_i)·A_iᵀ                                [R], in ``mixed_project``
    (2) y_t = a_i⊙[ (x_t⊙g_i)·W0ᵀ + u_t·B_i ] + bias        [N], with B_i = (s·B)ᵀ [R, N] as the bank keeps it

Tokens are taken in the order of their slots, in groups that share one, so that a tile has few of them. An entry of the
batch is a run of tokens (a sequence, or one token). ``index`` [4, entries] holds, in that order, the number of each
entry in the batch, its slot and its group, and at last the slot of each group.

``mixed_linear`` launches two kernels. The first makes (1) and x⊙g in that order of tokens, the second (2), and puts
every token back into its place. Both exist for few tokens, where one read of W0 is what counts, and for many.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Slots
from ..replay.recording import empty, launch
from .common import load_matrix, load_projection, load_vector
from .config import TRITON_DTYPES, cdiv, is_aligned, target
from .gemm import descriptor, fits_descriptor
from .mixed_config import mixed_few, mixed_few_config, mixed_many_config
from .mixed_project import add_product, groups_of_tile, look_up, project_few, project_many, split_of


@triton.jit
def _linear_few_kernel(
    scaled,  # [M, K], contiguous, in the order of the slots; a tensor descriptor with USE_DESCRIPTORS, as is w
    w,  # [N, K]
    index_ptr,  # [4, entries], contiguous
    row_scale_ptr,  # [slots, N], contiguous
    lora_B_ptr,  # [slots, R, N], contiguous
    projection_ptr,  # [PARTS, M, R], contiguous, in the order of the slots
    bias_ptr,  # [N]
    partial_ptr,  # [SPLITS + 1, M, N], contiguous, in that order
    counter_ptr,  # [tiles], zero
    y_ptr,  # [M, N], contiguous
    M, N, K, entries, tokens, split_size,
    stride_wn, stride_wk,
    R: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for a tile and a split of K, and with several splits one more for the low-rank product.

    The last of a tile's programs adds what they made, always in the same order. With one split it makes all.
    """
    pid_n, split, pid_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    rows, slots, groups = look_up(index_ptr, offs_m, M, entries, tokens)
    row_scale = tl.load(row_scale_ptr + (slots * N)[:, None] + offs_n[None, :], mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    if SPLITS > 1:
        start, end = (split - 1) * split_size, tl.minimum(split * split_size, K)  # none for the low-rank product
    else:
        start, end = 0, K
    if (SPLITS == 1) | (split > 0):
        for k in range(start, end, BLOCK_SIZE_C):
            if USE_DESCRIPTORS:
                scaled_tile = scaled.load([pid_m * BLOCK_SIZE_M, k])
                w_tile = w.load([pid_n * BLOCK_SIZE_N, k])
            else:
                offs_k = k + tl.arange(0, BLOCK_SIZE_C)
                scaled_tile = load_matrix(scaled, offs_m, offs_k, M, K, K, 1)  # [BLOCK_SIZE_M, BLOCK_SIZE_C]
                w_tile = load_matrix(w, offs_n, offs_k, N, K, stride_wn, stride_wk).to(DTYPE)
            acc = tl.dot(scaled_tile, tl.trans(w_tile), acc, input_precision=PRECISION)
    if split == 0:
        # u as a matrix [tokens, groups·ranks], zero where a group is not the token's, by the factors of these groups
        end_m = (pid_m + 1) * BLOCK_SIZE_M
        first, last = groups_of_tile(index_ptr, pid_m * BLOCK_SIZE_M, end_m, M, entries, tokens)
        for start_j in tl.range(first * R, (last + 1) * R, BLOCK_SIZE_R, num_stages=1):
            offs_j = start_j + tl.arange(0, BLOCK_SIZE_R)
            group, offs_r = offs_j // R, offs_j % R
            slot = tl.load(index_ptr + 3 * entries + group, mask=group <= last, other=0).to(tl.int64)
            mask_u = groups[:, None] == group[None, :]
            ptrs_u = projection_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
            u = tl.load(ptrs_u, mask=mask_u, other=0.0)
            for part in tl.static_range(1, PARTS):
                u += tl.load(ptrs_u + tl.full((), part, tl.int64) * M * R, mask=mask_u, other=0.0)
            ptrs_b = lora_B_ptr + ((slot * R + offs_r) * N)[:, None] + offs_n[None, :]
            factor = tl.load(ptrs_b, mask=(group <= last)[:, None] & (offs_n < N)[None, :], other=0.0)
            acc = add_product(u.to(DTYPE), factor, acc, PRECISION)
    acc *= row_scale
    is_last = True
    if SPLITS > 1:
        ptrs = partial_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(ptrs + tl.full((), split, tl.int64) * M * N, acc, mask=mask)
        tl.debug_barrier()  # all of this program's part is there before it counts as done
        is_last = tl.atomic_add(counter_ptr + pid_m * tl.num_programs(0) + pid_n, 1) == SPLITS
    if is_last:
        if SPLITS > 1:
            acc = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS + 1):
                offset = tl.full((), other, tl.int64) * M * N
                acc += tl.load(ptrs + offset, mask=mask, other=0.0, cache_modifier=".cg")
        if HAS_BIAS:
            acc += load_vector(bias_ptr, offs_n, N)[None, :]
        tl.store(y_ptr + rows[:, None] * N + offs_n[None, :], acc.to(DTYPE), mask=mask)  # (2)


@triton.jit
def _linear_many_kernel(
    scaled,  # [M, K], contiguous, in the order of the slots; a tensor descriptor with USE_DESCRIPTORS, as is w
    w,  # [N, K]
    index_ptr,  # [4, entries], contiguous
    row_scale_ptr,  # [slots, N], contiguous
    lora_B_ptr,  # [slots, R, N], contiguous
    projection_ptr,  # [PARTS, M, R], contiguous, in the order of the slots
    bias_ptr,  # [N]
    y_ptr,  # [M, N], contiguous
    M, N, K, entries, tokens,
    stride_wn, stride_wk,
    R: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr, STORES: tl.constexpr,
    HAS_BIAS: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Persistent programs, each of which makes a tile after the other."""
    num_tiles_m = tl.cdiv(M, BLOCK_SIZE_M)
    num_tiles_n = tl.cdiv(N, BLOCK_SIZE_N)
    group_tiles = GROUP_SIZE_M * num_tiles_n
    for tile in range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0)):
        # groups of GROUP_SIZE_M tiles along m share the tiles of w while they are in cache
        first_m = tile // group_tiles * GROUP_SIZE_M
        group_size = tl.minimum(num_tiles_m - first_m, GROUP_SIZE_M)
        start_m = (first_m + tile % group_tiles % group_size) * BLOCK_SIZE_M
        start_n = tile % group_tiles // group_size * BLOCK_SIZE_N
        offs_m = start_m + tl.arange(0, BLOCK_SIZE_M)
        offs_n = start_n + tl.arange(0, BLOCK_SIZE_N)
        rows, slots, groups = look_up(index_ptr, offs_m, M, entries, tokens)
        first, last = groups_of_tile(index_ptr, start_m, start_m + BLOCK_SIZE_M, M, entries, tokens)
        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_SIZE_C):
            if USE_DESCRIPTORS:
                scaled_tile = scaled.load([start_m, k])
                w_tile = w.load([start_n, k])
            else:
                offs_k = k + tl.arange(0, BLOCK_SIZE_C)
                scaled_tile = load_matrix(scaled, offs_m, offs_k, M, K, K, 1)
                w_tile = load_matrix(w, offs_n, offs_k, N, K, stride_wn, stride_wk).to(DTYPE)
            acc = tl.dot(scaled_tile, tl.trans(w_tile), acc, input_precision=PRECISION)

        for group in range(first, last + 1):
            mine = groups == group
            slot = tl.load(index_ptr + 3 * entries + group).to(tl.int64)
            for r in tl.range(0, R, BLOCK_SIZE_R, num_stages=1):
                offs_r = r + tl.arange(0, BLOCK_SIZE_R)
                u = load_projection(projection_ptr, offs_m, offs_r, M, M, R, PARTS)
                factor = load_matrix(lora_B_ptr + slot * R * N, offs_r, offs_n, R, N, N, 1)
                acc = add_product(tl.where(mine[:, None], u, 0.0).to(DTYPE), factor, acc, PRECISION)

        if STORES == 2:  # halves need half of the shared memory on their way out
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_SIZE_M, 2, BLOCK_SIZE_N // 2)), (0, 2, 1)))
            _finish(
                left, rows, slots, offs_m, first, last, row_scale_ptr, bias_ptr, y_ptr, start_n, M, N, HAS_BIAS, DTYPE
            )
            half = start_n + BLOCK_SIZE_N // 2
            _finish(
                right, rows, slots, offs_m, first, last, row_scale_ptr, bias_ptr, y_ptr, half, M, N, HAS_BIAS, DTYPE
            )
        else:
            _finish(
                acc, rows, slots, offs_m, first, last, row_scale_ptr, bias_ptr, y_ptr, start_n, M, N, HAS_BIAS, DTYPE
            )


@triton.jit
def _finish(
    acc, rows, slots, offs_m, first, last, row_scale_ptr, bias_ptr, y_ptr, start_n, M, N,
    HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    offs_n = start_n + tl.arange(0, acc.shape[1])
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if first == last:  # one group
        acc *= load_vector(row_scale_ptr + tl.max(slots) * N, offs_n, N)[None, :]
    else:
        acc *= tl.load(row_scale_ptr + (slots * N)[:, None] + offs_n[None, :], mask=mask, other=0.0)
    if HAS_BIAS:
        acc += load_vector(bias_ptr, offs_n, N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + offs_n[None, :], acc.to(DTYPE), mask=mask)  # (2)


def mixed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    slots: Slots,
    *,
    tokens: int,
    precision: str,
) -> Tensor:
    """y [M, N] in x's dtype.

    x [M, K], weight [N, K] (any strides), bias [N], index [4, M / tokens] int32 as at the head of this file; the
    tensors of ``slots`` are contiguous.
    """
    (M, K), N, R = x.shape, weight.shape[0], slots.lora_A.shape[1]
    device, dtype, entries = x.device, x.dtype, index.shape[1]
    arch, processors = target(x.get_device())
    scaled, y = empty((M, K), dtype, device), empty((M, N), dtype, device)
    descriptors_fit = weight.dtype == dtype and fits_descriptor(scaled) and fits_descriptor(weight)
    wide = slots.lora_B.dtype != dtype
    common = {
        "M": M, "N": N, "K": K, "entries": entries, "tokens": tokens,
        "stride_wn": weight.stride(0), "stride_wk": weight.stride(1),
        "R": R, "HAS_BIAS": bias is not None, "DTYPE": TRITON_DTYPES[dtype], "PRECISION": precision,
    }  # fmt: skip
    if mixed_few(arch, M):
        splits, config = mixed_few_config(arch, processors, M, N, K, dtype, descriptors_fit, wide)
        tiles = cdiv(N, config["BLOCK_SIZE_N"]), cdiv(M, config["BLOCK_SIZE_M"])
        counter = empty((tiles[0] * tiles[1],), torch.int32, device)
        projection = project_few(x, index, slots, scaled, counter, tokens=tokens)
        partial = empty((splits + 1, M, N) if splits > 1 else (1,), torch.float32, device)
        operands = _operands(scaled, weight, config)
        launch(
            _linear_few_kernel,
            (tiles[0], splits + (splits > 1), tiles[1]),
            (*operands, index, slots.row_scale, slots.lora_B, projection, bias, partial, counter, y),
            split_size=split_of(K, splits, config), PARTS=projection.shape[0], SPLITS=splits, **common, **config,
        )  # fmt: skip
        return y
    projection = project_many(x, index, slots, scaled, tokens=tokens, precision=precision)
    grid, config = mixed_many_config(M, N, R, dtype, x.get_device(), descriptors_fit, is_aligned(weight), wide)
    launch(
        _linear_many_kernel,
        grid,
        (*_operands(scaled, weight, config), index, slots.row_scale, slots.lora_B, projection, bias, y),
        PARTS=projection.shape[0], **common, **config,
    )  # fmt: skip
    return y


def _operands(scaled: Tensor, weight: Tensor, config: dict) -> tuple:
    """Of the product: as they are, or as tensor descriptors."""
    if not config["USE_DESCRIPTORS"]:
        return scaled, weight
    block_c = config["BLOCK_SIZE_C"]
    return descriptor(scaled, [config["BLOCK_SIZE_M"], block_c]), descriptor(weight, [config["BLOCK_SIZE_N"], block_c])
