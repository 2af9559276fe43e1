"""The base product with the low-rank product and the scale on its float32 accumulator.

    out = scale⊙( t·Wᵀ + projection·factor ) + bias

With t = x⊙g, W = W0 [N, K], projection = u, factor = Bᵀ and scale = a this is y, equation (2) of ``ops.torch_backend``;
with t = dy⊙a, W = W0ᵀ (a view), projection = v, factor = A and scale = g it is dx, equation (4). One persistent kernel
does both. Where the hardware has tensor descriptors (TMA) and the operands are aligned, they fill its tiles.

There the low-rank product lengthens the inner dimension: one loop runs over the columns of t and then over those of
the projection, which meets the factor as ``split_low_rank`` lays them out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..replay.recording import empty, launch
from .common import dot_split, keep_mask, load_matrix, load_projection, load_vector
from .config import TRITON_DTYPES, cdiv, gemm_config, is_aligned, is_half, parts_in_use, split_config, target


@triton.jit
def _scaled_gemm_kernel(
    t,  # [M, C]; a tensor descriptor with USE_DESCRIPTORS, as are w, t_tail, w_tail, out and product
    w,  # [O, C]; stored as [C, O] unless W_ROWS_ARE_OUTPUTS
    t_tail,  # [M, TAIL], what follows the columns of t
    w_tail,  # [O, TAIL], stored like w
    out,  # [M, O], contiguous
    product,  # [M, O], contiguous: scale⊙(…) before the bias, with stand_in for zero scales
    projection_ptr,  # [PARTS, M, R], contiguous
    factor_ptr,  # [R, O]
    scale_ptr,  # [O]
    bias_ptr,  # [O]
    seed_ptr,  # [1]
    M, O, C,
    stride_tm, stride_tc, stride_wo, stride_wc, stride_fr, stride_fo,
    stand_in, out_stand_in, dropout_p,
    R: tl.constexpr, PARTS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_O: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr, STORES: tl.constexpr,
    W_ROWS_ARE_OUTPUTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    SAVE_PRODUCT: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles_m = tl.cdiv(M, BLOCK_SIZE_M)
    num_tiles_o = tl.cdiv(O, BLOCK_SIZE_O)
    group_tiles = GROUP_SIZE_M * num_tiles_o
    steps = tl.cdiv(C, BLOCK_SIZE_C)
    # as one loop with the inner one, the next tile's loads run under the end of this one
    for tile in tl.range(tl.program_id(0), num_tiles_m * num_tiles_o, tl.num_programs(0), flatten=TAIL > 0):
        # groups of GROUP_SIZE_M tiles along m share the tiles of w while they are in cache
        first_m = tile // group_tiles * GROUP_SIZE_M
        group_size = tl.minimum(num_tiles_m - first_m, GROUP_SIZE_M)
        start_m = (first_m + tile % group_tiles % group_size) * BLOCK_SIZE_M
        start_o = tile % group_tiles // group_size * BLOCK_SIZE_O
        offs_m = start_m + tl.arange(0, BLOCK_SIZE_M)

        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_O), dtype=tl.float32)
        for k in range(steps + tl.cdiv(TAIL, BLOCK_SIZE_C)):
            start_c = k * BLOCK_SIZE_C
            if USE_DESCRIPTORS:
                t_from, w_from = t, w
                if TAIL > 0:
                    if k >= steps:  # chooses between two addresses, so that loads are pipelined all the same
                        t_from, w_from, start_c = t_tail, w_tail, (k - steps) * BLOCK_SIZE_C
                t_tile = t_from.load([start_m, start_c])
                if W_ROWS_ARE_OUTPUTS:
                    w_tile = w_from.load([start_o, start_c]).T
                else:
                    w_tile = w_from.load([start_c, start_o])
            else:
                offs_c = start_c + tl.arange(0, BLOCK_SIZE_C)
                offs_o = start_o + tl.arange(0, BLOCK_SIZE_O)
                t_tile = load_matrix(t, offs_m, offs_c, M, C, stride_tm, stride_tc)
                w_tile = load_matrix(w, offs_c, offs_o, C, O, stride_wc, stride_wo).to(DTYPE)
            acc = tl.dot(t_tile, w_tile, acc, input_precision=PRECISION)

        if TAIL == 0:
            offs_o = start_o + tl.arange(0, BLOCK_SIZE_O)
            low_rank = tl.zeros_like(acc) if HAS_DROPOUT else acc
            for r in range(0, R, BLOCK_SIZE_R):
                offs_r = r + tl.arange(0, BLOCK_SIZE_R)
                projection = load_projection(projection_ptr, offs_m, offs_r, M, M, R, PARTS).to(DTYPE)
                factor = load_matrix(factor_ptr, offs_r, offs_o, R, O, stride_fr, stride_fo).to(tl.float32)
                low_rank = dot_split(projection, factor, low_rank, PRECISION)
            if HAS_DROPOUT:
                keep = keep_mask(tl.load(seed_ptr), offs_m, offs_o, dropout_p)
                acc += tl.where(keep, low_rank / (1.0 - dropout_p), 0.0)
            else:
                acc = low_rank

        if STORES == 2:  # halves need half of the shared memory on their way out
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_SIZE_M, 2, BLOCK_SIZE_O // 2)), (0, 2, 1)))
            _scale_and_store(
                left, out, product, scale_ptr, bias_ptr, start_m, start_o, M, O, stand_in, out_stand_in,
                HAS_SCALE, HAS_BIAS, SAVE_PRODUCT, USE_DESCRIPTORS, DTYPE,
            )  # fmt: skip
            _scale_and_store(
                right, out, product, scale_ptr, bias_ptr, start_m, start_o + BLOCK_SIZE_O // 2, M, O,
                stand_in, out_stand_in, HAS_SCALE, HAS_BIAS, SAVE_PRODUCT, USE_DESCRIPTORS, DTYPE,
            )  # fmt: skip
        else:
            _scale_and_store(
                acc, out, product, scale_ptr, bias_ptr, start_m, start_o, M, O, stand_in, out_stand_in,
                HAS_SCALE, HAS_BIAS, SAVE_PRODUCT, USE_DESCRIPTORS, DTYPE,
            )  # fmt: skip


@triton.jit
def _scale_and_store(
    acc, out, product, scale_ptr, bias_ptr, start_m, start_o, M, O, stand_in, out_stand_in,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRODUCT: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    offs_m = start_m + tl.arange(0, acc.shape[0])
    offs_o = start_o + tl.arange(0, acc.shape[1])
    if HAS_SCALE:
        scale = load_vector(scale_ptr, offs_o, O)
        if SAVE_PRODUCT:
            kept = (acc * tl.where(scale == 0.0, stand_in, scale)[None, :]).to(DTYPE)
            _store_tile(product, kept, start_m, start_o, offs_m, offs_o, M, O, USE_DESCRIPTORS)
        acc *= tl.where(scale == 0.0, out_stand_in, scale)[None, :]
    if HAS_BIAS:
        acc += load_vector(bias_ptr, offs_o, O)[None, :]
    _store_tile(out, acc.to(DTYPE), start_m, start_o, offs_m, offs_o, M, O, USE_DESCRIPTORS)


@triton.jit
def _store_tile(out, tile, start_m, start_o, offs_m, offs_o, M, O, USE_DESCRIPTORS: tl.constexpr):
    if USE_DESCRIPTORS:
        out.store([start_m, start_o], tile)
    else:
        ptrs = out + offs_m.to(tl.int64)[:, None] * O + offs_o[None, :]
        tl.store(ptrs, tile, mask=(offs_m < M)[:, None] & (offs_o < O)[None, :])


@triton.jit
def _tail_kernel(
    projection_ptr,  # [PARTS, M, R], contiguous
    factor_ptr,  # [R, O]
    t_tail_ptr,  # [M, TERMS·R]
    w_tail_ptr,  # [O, TERMS·R]
    M, O,
    stride_fr, stride_fo, stride_tm, stride_wo, stride_wr,
    R: tl.constexpr, PARTS: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    pid, num_blocks_m = tl.program_id(0), tl.cdiv(M, BLOCK_SIZE)
    offs_r = tl.program_id(1) * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    if pid < num_blocks_m:
        offs_m = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        projection = load_projection(projection_ptr, offs_m, offs_r, M, M, R, PARTS)
        _store_tail(t_tail_ptr, projection, offs_m, offs_r, M, stride_tm, 1, R, TERMS, False, DTYPE)
    else:
        offs_o = (pid - num_blocks_m) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        factor = load_matrix(factor_ptr, offs_o, offs_r, O, R, stride_fo, stride_fr).to(tl.float32)
        _store_tail(w_tail_ptr, factor, offs_o, offs_r, O, stride_wo, stride_wr, R, TERMS, True, DTYPE)


@triton.jit
def _store_tail(
    ptr, values, offs_i, offs_r, size_i, stride_i, stride_r,
    R: tl.constexpr, TERMS: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """As TERMS times R columns: terms that add up to the values with SPLIT, copies otherwise."""
    mask = (offs_i < size_i)[:, None] & (offs_r < R)[None, :]
    for term in tl.static_range(TERMS):
        rounded = values.to(DTYPE)
        columns = (term * R + offs_r).to(tl.int64)
        tl.store(ptr + offs_i.to(tl.int64)[:, None] * stride_i + columns[None, :] * stride_r, rounded, mask=mask)
        if SPLIT:
            values -= rounded.to(tl.float32)


def scaled_gemm(
    t: Tensor,
    W: Tensor,
    projection: Tensor,
    factor: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    dropout_p: float,
    stand_in: float,
    out_stand_in: float,
    save_product: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """out [M, O] in t's dtype, and the product before the bias (out itself unless ``save_product``).

    t [M, C], W [O, C] (any strides), projection [parts, M, R] as ``project`` leaves it, factor [R, O], scale and
    bias [O]. A zero scale counts as ``out_stand_in`` in the output and as ``stand_in`` in a product that is apart.
    """
    (M, C), O, (allocated, _, R) = t.shape, W.shape[0], projection.shape
    parts = parts_in_use(allocated, M, target(t.get_device())[1])
    save_product = save_product and scale is not None
    out = empty((M, O), t.dtype, t.device)
    product = empty((M, O), t.dtype, t.device) if save_product else out
    rows_are_outputs = W.stride(1) == 1
    stored_w = W if rows_are_outputs else W.T
    descriptors_fit = W.dtype == t.dtype and all(map(fits_descriptor, (t, stored_w, out)))
    grid, config = gemm_config(M, O, C, t.dtype, W.get_device(), descriptors_fit, is_aligned(t), seed is not None)
    operands: tuple = (t, W, None, None, out, product)
    tail = 0
    if config["USE_DESCRIPTORS"]:
        t_tail = w_tail = None
        if seed is None:
            t_tail, w_tail = split_low_rank(projection, factor, parts, t.dtype, rows_are_outputs)
            tail = t_tail.shape[1]
        block_m, block_o, block_c = config["BLOCK_SIZE_M"], config["BLOCK_SIZE_O"], config["BLOCK_SIZE_C"]
        w_block = [block_o, block_c] if rows_are_outputs else [block_c, block_o]
        out_block = [block_m, block_o // config["STORES"]]
        operands = (
            descriptor(t, [block_m, block_c]), descriptor(stored_w, w_block),
            descriptor(t_tail, [block_m, block_c]), descriptor(w_tail, w_block),
            descriptor(out, out_block), descriptor(product, out_block),
        )  # fmt: skip

    launch(
        _scaled_gemm_kernel,
        grid,
        (*operands, projection, factor, scale, bias, seed),
        M=M, O=O, C=C,
        stride_tm=t.stride(0), stride_tc=t.stride(1), stride_wo=W.stride(0), stride_wc=W.stride(1),
        stride_fr=factor.stride(0), stride_fo=factor.stride(1),
        stand_in=stand_in, out_stand_in=out_stand_in, dropout_p=dropout_p,
        R=R, PARTS=parts, TAIL=tail, W_ROWS_ARE_OUTPUTS=rows_are_outputs, HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None, SAVE_PRODUCT=save_product,
        DTYPE=TRITON_DTYPES[t.dtype], PRECISION=precision, **config,
    )  # fmt: skip
    return out, product


def split_low_rank(
    projection: Tensor, factor: Tensor, parts: int, dtype: torch.dtype, rows_are_outputs: bool
) -> tuple[Tensor, Tensor]:
    """Tails [M, T] and [O, T] of the inner dimension, whose product is projection·factor; the second is stored as
    [T, O] unless ``rows_are_outputs``.

    A half-precision projection meets the factor as two terms, its rounded value and what that leaves of it, so that no
    small update of the factor is lost: T = 2R, and the projection is there twice. In float32 T = R.
    """
    _, M, R = projection.shape
    O, terms = factor.shape[1], 2 if is_half(dtype) else 1
    t_tail = _aligned_rows(M, terms * R, dtype, factor.device)
    w_tail = _aligned_rows(*((O, terms * R) if rows_are_outputs else (terms * R, O)), dtype, factor.device)
    strides_w = w_tail.stride() if rows_are_outputs else w_tail.stride()[::-1]
    config = split_config(R)
    block = config["BLOCK_SIZE"]
    launch(
        _tail_kernel,
        (cdiv(M, block) + cdiv(O, block), cdiv(R, config["BLOCK_SIZE_R"])),
        (projection, factor, t_tail, w_tail),
        M=M, O=O,
        stride_fr=factor.stride(0), stride_fo=factor.stride(1), stride_tm=t_tail.stride(0),
        stride_wo=strides_w[0], stride_wr=strides_w[1],
        R=R, PARTS=parts, TERMS=terms, DTYPE=TRITON_DTYPES[dtype], **config,
    )  # fmt: skip
    return t_tail, w_tail


def _aligned_rows(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized [rows, cols] whose rows start at multiples of 16 bytes."""
    return empty((rows, cdiv(cols, 8) * 8), dtype, device)[:, :cols]


def descriptor(matrix: Tensor | None, block: list[int]) -> TensorDescriptor | None:
    return None if matrix is None else TensorDescriptor.from_tensor(matrix, block)


def fits_descriptor(matrix: Tensor) -> bool:
    """Whether a TMA descriptor can address the matrix: unit inner stride, 16-byte aligned rows and start."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
    )
