"""The base product with the low-rank product and the scale on its float32 accumulator.

    out = scale⊙( t·Wᵀ + projection·factor ) + bias

With t = x⊙g, W = W0 [N, K], projection = u, factor = Bᵀ and scale = a this is y, equation (2) of ``factored``; with
t = dy⊙a, W = W0ᵀ (a view), projection = v, factor = A and scale = g it is dx, equation (4). One persistent kernel does
both. Where the hardware has tensor descriptors (TMA) and the operands are aligned, they fill its tiles.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import dot_split, keep_mask, load_matrix, load_projection, load_vector
from .config import TRITON_DTYPES, gemm_config, is_aligned, parts_in_use
from .launch import empty, launch


@triton.jit
def _scaled_gemm_kernel(
    t,  # [M, C]; a tensor descriptor with USE_DESCRIPTORS, as are w, out and product
    w,  # [O, C]; stored as [C, O] unless W_ROWS_ARE_OUTPUTS
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
    R: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_O: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    W_ROWS_ARE_OUTPUTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    SAVE_PRODUCT: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles_m = tl.cdiv(M, BLOCK_SIZE_M)
    num_tiles_o = tl.cdiv(O, BLOCK_SIZE_O)
    group_tiles = GROUP_SIZE_M * num_tiles_o
    for tile in range(tl.program_id(0), num_tiles_m * num_tiles_o, tl.num_programs(0)):
        # groups of GROUP_SIZE_M tiles along m share the tiles of w while they are in cache
        first_m = tile // group_tiles * GROUP_SIZE_M
        group_size = tl.minimum(num_tiles_m - first_m, GROUP_SIZE_M)
        start_m = (first_m + tile % group_tiles % group_size) * BLOCK_SIZE_M
        start_o = tile % group_tiles // group_size * BLOCK_SIZE_O
        offs_m = start_m + tl.arange(0, BLOCK_SIZE_M)
        offs_o = start_o + tl.arange(0, BLOCK_SIZE_O)

        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_O), dtype=tl.float32)
        for k in range(tl.cdiv(C, BLOCK_SIZE_C)):
            start_c = k * BLOCK_SIZE_C
            if USE_DESCRIPTORS:
                t_tile = t.load([start_m, start_c])
                if W_ROWS_ARE_OUTPUTS:
                    w_tile = w.load([start_o, start_c]).T
                else:
                    w_tile = w.load([start_c, start_o])
            else:
                offs_c = start_c + tl.arange(0, BLOCK_SIZE_C)
                t_tile = load_matrix(t, offs_m, offs_c, M, C, stride_tm, stride_tc)
                w_tile = load_matrix(w, offs_c, offs_o, C, O, stride_wc, stride_wo).to(DTYPE)
            acc = tl.dot(t_tile, w_tile, acc, input_precision=PRECISION)

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
    save_product: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """out [M, O] in t's dtype, and the product before the bias (out itself unless ``save_product``).

    t [M, C], W [O, C] (any strides), projection [parts, M, R] as ``project`` leaves it, factor [R, O], scale and
    bias [O]. With ``save_product`` a zero scale gives a zero output and ``stand_in`` only in the product; otherwise
    in the output.
    """
    (M, C), O, (allocated, _, R) = t.shape, W.shape[0], projection.shape
    parts = parts_in_use(allocated, M)
    out = empty((M, O), t.dtype, t.device)
    product = empty((M, O), t.dtype, t.device) if save_product else out
    rows_are_outputs = W.stride(1) == 1
    stored_w = W if rows_are_outputs else W.T
    descriptors_fit = W.dtype == t.dtype and all(map(_fits_descriptor, (t, stored_w, out)))
    grid, config = gemm_config(M, O, C, t.dtype, W.get_device(), descriptors_fit, is_aligned(t), seed is not None)
    operands = (t, W, out, product)
    if config["USE_DESCRIPTORS"]:
        block_m, block_o, block_c = config["BLOCK_SIZE_M"], config["BLOCK_SIZE_O"], config["BLOCK_SIZE_C"]
        out_descriptor = TensorDescriptor.from_tensor(out, [block_m, block_o])
        operands = (
            TensorDescriptor.from_tensor(t, [block_m, block_c]),
            TensorDescriptor.from_tensor(stored_w, [block_o, block_c] if rows_are_outputs else [block_c, block_o]),
            out_descriptor,
            TensorDescriptor.from_tensor(product, [block_m, block_o]) if save_product else out_descriptor,
        )

    launch(
        _scaled_gemm_kernel,
        grid,
        (*operands, projection, factor, scale, bias, seed),
        M=M, O=O, C=C,
        stride_tm=t.stride(0), stride_tc=t.stride(1), stride_wo=W.stride(0), stride_wc=W.stride(1),
        stride_fr=factor.stride(0), stride_fo=factor.stride(1),
        stand_in=stand_in, out_stand_in=0.0 if save_product else stand_in, dropout_p=dropout_p,
        R=R, PARTS=parts, W_ROWS_ARE_OUTPUTS=rows_are_outputs, HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None, SAVE_PRODUCT=save_product and scale is not None,
        DTYPE=TRITON_DTYPES[t.dtype], PRECISION=precision, **config,
    )  # fmt: skip
    return out, product


def _fits_descriptor(matrix: Tensor) -> bool:
    """Whether a TMA descriptor can address the matrix: unit inner stride, 16-byte aligned rows and start."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
    )
