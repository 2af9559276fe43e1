"""A batch of several adapters over one weight, for inference: every token has the adapter of its slot i in a bank.

    (1) u_t = (x_t⊙g_i)·A_iᵀ                                [R], in ``mixed_project``
    (2) y_t = a_i⊙[ (x_t⊙g_i)·W0ᵀ + u_t·B_i ] + bias        [N], with B_i = (s·B)ᵀ [R, N] as the bank keeps it

Tokens are taken in the order of their slots, in groups that share one, so that a tile has few of them. An entry of the
batch is a run of tokens (a sequence, or one token). ``index`` [4, entries] holds, in that order, the number of each
entry in the batch, its slot and its group, and at last the slot of each group.

``mixed_linear`` launches two kernels. The first makes (1) and x⊙g in that order of tokens, the second (2), and puts
every token back into its place. Both exist for few tokens, see ``mixed_few``, and for many.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..contract import Slots
from ..replay.recording import empty, launch
from .common import load_matrix, load_vector
from .config import TRITON_DTYPES, is_aligned, target
from .gemm import fits_descriptor
from .mixed_config import mixed_few, mixed_many_config
from .mixed_few import linear_few, operands
from .mixed_project import add_product, groups_of_tile, look_up, project_many


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
                u = _load_projection(projection_ptr, offs_m, offs_r, M, R, PARTS)
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
def _load_projection(ptr, offs_m, offs_r, M, R: tl.constexpr, PARTS: tl.constexpr):
    """A tile of u [M, R], stored in parts [PARTS, M, R]."""
    projection = load_matrix(ptr, offs_m, offs_r, M, R, R, 1)
    for part in tl.static_range(1, PARTS):
        projection += load_matrix(ptr + tl.full((), part, tl.int64) * M * R, offs_m, offs_r, M, R, R, 1)
    return projection


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
        linear_few(
            x, weight, bias, index, slots, scaled, y,
            tokens=tokens, descriptors_fit=descriptors_fit, precision=precision,
        )  # fmt: skip
        return y
    projection = project_many(x, index, slots, scaled, tokens=tokens, precision=precision)
    grid, config = mixed_many_config(M, N, R, dtype, x.get_device(), descriptors_fit, is_aligned(weight), wide)
    launch(
        _linear_many_kernel,
        grid,
        (*operands(scaled, weight, config), index, slots.row_scale, slots.lora_B, projection, bias, y),
        PARTS=projection.shape[0], **common, **config,
    )  # fmt: skip
    return y
