"""A mixed batch of few tokens, for which one read of W0 is what counts; equations as in ``mixed``.

Where K is split, the last of a tile's programs adds the parts. For more than 32 tokens on an H100 a launch of its own
does, and the product of a batch that has one adapter alone makes u itself: a tile of A comes along with each of W0, and
the first launch leaves u out. It is ``index`` that says so, so that a CUDA graph goes on with another batch.

Launches overlap there: each begins while the one before it runs, and waits before it reads what that one writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Slots
from ..replay.recording import empty, launch
from .common import load_matrix, load_vector
from .config import TRITON_DTYPES, cdiv, target
from .gemm import descriptor
from .mixed_config import mixed_apart_config, mixed_few_config, mixed_overlap
from .mixed_project import add_product, groups_of_tile, is_alone, look_up, project_few, split_of


@triton.jit
def _add_low_rank(
    acc, groups, offs_n, start_m, index_ptr, lora_B_ptr, projection_ptr, M, N, entries, tokens,
    R: tl.constexpr, PARTS: tl.constexpr, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + u·B, with u as a matrix [tokens, groups·ranks], zero where a group is not the token's."""
    offs_m = start_m + tl.arange(0, BLOCK_SIZE_M)
    first, last = groups_of_tile(index_ptr, start_m, start_m + BLOCK_SIZE_M, M, entries, tokens)
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
    return acc


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
    HAS_BIAS: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, OVERLAP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for a tile and a split of K, and with several splits one more for the low-rank product.

    The last of a tile's programs adds what they made, always in the same order. With one split it makes all.
    With OVERLAP a program may begin while the first launch runs, and waits before it reads what that one wrote.
    """
    pid_n, split, pid_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    rows, slots, groups = look_up(index_ptr, offs_m, M, entries, tokens)
    row_scale = tl.load(row_scale_ptr + (slots * N)[:, None] + offs_n[None, :], mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
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
        acc = _add_low_rank(
            acc, groups, offs_n, pid_m * BLOCK_SIZE_M, index_ptr, lora_B_ptr, projection_ptr, M, N, entries, tokens,
            R, PARTS, BLOCK_SIZE_M, BLOCK_SIZE_R, DTYPE, PRECISION,
        )  # fmt: skip
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
def _parts_kernel(
    scaled,  # descriptor of [M, K], in the order of the slots
    w,  # descriptor of [N, K]
    lora_A,  # descriptor of [slots * R, K]
    index_ptr,  # [4, entries], contiguous
    lora_B_ptr,  # [slots, R, N], contiguous
    projection_ptr,  # [PARTS, M, R], contiguous, in the order of the slots
    partial_ptr,  # [SPLITS, M, N], contiguous, in that order
    M, N, K, entries, tokens, split_size,
    R: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    RANKS: tl.constexpr, OVERLAP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for a tile and a split of K: (2) without a and bias, of these columns of x⊙g and W0.

    The first split adds the low-rank product; with one adapter alone each adds that of its columns.
    """
    pid_n, split, pid_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start_m, start_n = pid_m * BLOCK_SIZE_M, pid_n * BLOCK_SIZE_N
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_SIZE_M), start_n + tl.arange(0, BLOCK_SIZE_N)
    alone = is_alone(index_ptr, entries)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    start, end = split * split_size, tl.minimum((split + 1) * split_size, K)
    if alone:
        slot = tl.load(index_ptr + 3 * entries)
        offs_r = tl.arange(0, RANKS)
        u = tl.zeros((BLOCK_SIZE_M, RANKS), dtype=tl.float32)
        for k in range(start, end, BLOCK_SIZE_C):
            scaled_tile = scaled.load([start_m, k])  # [BLOCK_SIZE_M, BLOCK_SIZE_C]
            acc = tl.dot(scaled_tile, tl.trans(w.load([start_n, k])), acc, input_precision=PRECISION)
            u = add_product(scaled_tile, tl.trans(lora_A.load([slot * R, k])), u, PRECISION)  # (1)
        u = tl.where((offs_r < R)[None, :], u, 0.0)  # the rows after R are another adapter's
        factor = load_matrix(lora_B_ptr + slot.to(tl.int64) * R * N, offs_r, offs_n, R, N, N, 1)
        acc = add_product(u.to(DTYPE), factor, acc, PRECISION)
    else:
        for k in range(start, end, BLOCK_SIZE_C):
            scaled_tile = scaled.load([start_m, k])
            acc = tl.dot(scaled_tile, tl.trans(w.load([start_n, k])), acc, input_precision=PRECISION)
        if split == 0:
            _, _, groups = look_up(index_ptr, offs_m, M, entries, tokens)
            acc = _add_low_rank(
                acc, groups, offs_n, start_m, index_ptr, lora_B_ptr, projection_ptr, M, N, entries, tokens,
                R, PARTS, BLOCK_SIZE_M, BLOCK_SIZE_R, DTYPE, PRECISION,
            )  # fmt: skip
    ptrs = partial_ptr + (tl.full((), split, tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(ptrs, acc, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _add_parts_kernel(
    partial_ptr,  # [SPLITS, M, N], contiguous, in the order of the slots
    index_ptr,  # [4, entries], contiguous
    row_scale_ptr,  # [slots, N], contiguous
    bias_ptr,  # [N]
    y_ptr,  # [M, N], contiguous
    M, N, entries, tokens,
    SPLITS: tl.constexpr, BLOCK_SIZE_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program for a token and some columns: the parts in their order, a and bias."""
    offs_n = tl.program_id(0) * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    m = tl.program_id(1)
    row = tl.load(index_ptr + m // tokens).to(tl.int64) * tokens + m % tokens
    slot = tl.load(index_ptr + entries + m // tokens).to(tl.int64)
    row_scale = load_vector(row_scale_ptr + slot * N, offs_n, N)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_SIZE_N,), dtype=tl.float32)
    for part in tl.static_range(SPLITS):
        acc += load_vector(partial_ptr + (tl.full((), part, tl.int64) * M + m) * N, offs_n, N)
    acc *= row_scale
    if HAS_BIAS:
        acc += load_vector(bias_ptr, offs_n, N)
    tl.store(y_ptr + row * N + offs_n, acc.to(DTYPE), mask=offs_n < N)  # (2)


def linear_few(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    slots: Slots,
    scaled: Tensor,
    y: Tensor,
    *,
    tokens: int,
    descriptors_fit: bool,
    precision: str,
) -> None:
    """Write y, by way of x⊙g in ``scaled``; arguments as in ``mixed.mixed_linear``."""
    (M, K), N, R = x.shape, weight.shape[0], slots.lora_A.shape[1]
    device, dtype = x.device, x.dtype
    arch, processors = target(x.get_device())
    wide, overlap = slots.lora_B.dtype != dtype, mixed_overlap(arch, M, N)
    early = {"launch_pdl": True} if overlap else {}
    sizes = {"M": M, "N": N, "K": K, "entries": index.shape[1], "tokens": tokens}
    common = {"R": R, "OVERLAP": overlap, "DTYPE": TRITON_DTYPES[dtype], "PRECISION": precision}
    apart = mixed_apart_config(arch, processors, M, N, K, R, dtype, descriptors_fit, wide)
    if apart is not None:
        splits, config = apart
        projection = project_few(x, index, slots, scaled, None, tokens=tokens, overlap=overlap)
        partial = empty((splits, M, N), torch.float32, device)
        block_c = config["BLOCK_SIZE_C"]
        launch(
            _parts_kernel,
            (cdiv(N, config["BLOCK_SIZE_N"]), splits, cdiv(M, config["BLOCK_SIZE_M"])),
            (
                descriptor(scaled, [config["BLOCK_SIZE_M"], block_c]),
                descriptor(weight, [config["BLOCK_SIZE_N"], block_c]),
                descriptor(slots.lora_A.flatten(0, 1), [config["RANKS"], block_c]),
                index, slots.lora_B, projection, partial,
            ),
            split_size=split_of(K, splits, config), PARTS=projection.shape[0], **sizes, **common, **config, **early,
        )  # fmt: skip
        launch(
            _add_parts_kernel,
            (cdiv(N, 512), M),
            (partial, index, slots.row_scale, bias, y),
            M=M, N=N, entries=index.shape[1], tokens=tokens,
            SPLITS=splits, BLOCK_SIZE_N=512,
            HAS_BIAS=bias is not None, OVERLAP=overlap, DTYPE=common["DTYPE"], num_warps=4, **early,
        )  # fmt: skip
        return
    splits, config = mixed_few_config(arch, processors, M, N, K, dtype, descriptors_fit, wide)
    tiles = cdiv(N, config["BLOCK_SIZE_N"]), cdiv(M, config["BLOCK_SIZE_M"])
    counter = empty((tiles[0] * tiles[1],), torch.int32, device)
    projection = project_few(x, index, slots, scaled, counter, tokens=tokens, overlap=overlap)
    partial = empty((splits + 1, M, N) if splits > 1 else (1,), torch.float32, device)
    launch(
        _linear_few_kernel,
        (tiles[0], splits + (splits > 1), tiles[1]),
        (
            *operands(scaled, weight, config), index, slots.row_scale, slots.lora_B, projection, bias, partial, counter,
            y,
        ),
        split_size=split_of(K, splits, config), stride_wn=weight.stride(0), stride_wk=weight.stride(1),
        PARTS=projection.shape[0], SPLITS=splits, HAS_BIAS=bias is not None,
        **sizes, **common, **config, **early,
    )  # fmt: skip


def operands(scaled: Tensor, weight: Tensor, config: dict) -> tuple:
    """Of a product: as they are, or as tensor descriptors."""
    if not config["USE_DESCRIPTORS"]:
        return scaled, weight
    block_c = config["BLOCK_SIZE_C"]
    return descriptor(scaled, [config["BLOCK_SIZE_M"], block_c]), descriptor(weight, [config["BLOCK_SIZE_N"], block_c])
