"""The base product with the low-rank product and the scale on its float32 accumulator.

    out = scale⊙( t·Wᵀ + projection·factor ) + bias

With t = x⊙g, W = W0 [N, K], projection = u, factor = Bᵀ and scale = a this is y, equation (2) of ``ops.torch_backend``;
with t = dy⊙a, W = W0ᵀ (a view), projection = v, factor = A and scale = g it is dx, equation (4). One persistent kernel
does both. Where the hardware has tensor descriptors (TMA) and the operands are aligned, they fill its tiles.

There the low-rank product lengthens the inner dimension: one loop runs over the columns of t and then over those of
the projection, which meets the factor as ``split_low_rank`` lays them out.

Where the update cancels lines of W0, the two products are large and nearly opposite. Once the norms leave word of such
lines (``norms``), this kernel leaves a float32 W to ``gemm_of_v``. In half precision the low-rank product is then made
of the same rounded t as the base product, and of more digits: what is left is t·Vᵀ, with as many as float32 has to
spare.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..replay.recording import empty, launch
from .common import any_set, choose, dot_split, keep_mask, load_matrix
from .config import TRITON_DTYPES, cdiv, gemm_config, is_aligned, is_half
from .epilogue import scale_and_store
from .gemm_of_v import gemm_of_v
from .overlap import overlapping, wait_for_last
from .tail import add_parts, split_low_rank, tail_terms


@triton.jit(do_not_specialize=["first_tile", "num_tiles"])
def _scaled_gemm_kernel(
    t,  # [M, C]; a tensor descriptor with USE_DESCRIPTORS, as are w, t_tail, w_tail, out and product
    w,  # [O, C]; stored as [C, O] unless W_ROWS_ARE_OUTPUTS
    t_tail,  # [M, TAIL], what follows the columns of t
    w_tail,  # [O, TAIL], stored like w
    out,  # [M, O], contiguous
    product,  # [M, O], contiguous: scale⊙(…) before the bias, with stand_in for zero scales
    projection_ptr,  # [M, R], contiguous
    rounded_ptr,  # [M, R]: what stands for it where lines are cancelled
    factor_ptr,  # [R, O]
    word_ptr,  # [2]: not 0 where lines are cancelled
    scale_ptr,  # [O]
    bias_ptr,  # [O]
    seed_ptr,  # [1]
    M, O, C, first_tile, num_tiles,
    stride_tm, stride_tc, stride_wo, stride_wc, stride_fr, stride_fo,
    stand_in, out_stand_in, dropout_p,
    R: tl.constexpr, TAIL: tl.constexpr, SPARE_STEPS: tl.constexpr,
    HAS_WORD: tl.constexpr, HAS_ROUNDED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_O: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr, OVER_M: tl.constexpr, OVER_O: tl.constexpr, STORES: tl.constexpr,
    W_ROWS_ARE_OUTPUTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    SAVE_PRODUCT: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    OVERLAP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    # tiles of OVER_M x OVER_O blocks, of which this launch does the blocks of some
    num_tiles_m = tl.cdiv(M, OVER_M * BLOCK_SIZE_M)
    num_tiles_o = tl.cdiv(O, OVER_O * BLOCK_SIZE_O)
    num_blocks = num_tiles * OVER_M * OVER_O
    group_tiles = GROUP_SIZE_M * num_tiles_o
    steps = tl.cdiv(C, BLOCK_SIZE_C)
    all_steps = steps + tl.cdiv(TAIL, BLOCK_SIZE_C)
    if HAS_WORD:
        if WIDE:  # ``gemm_of_v`` does it
            num_blocks = tl.where(any_set(word_ptr, 2), 0, num_blocks)
        elif SPARE_STEPS > 0:  # of the tail's third term
            all_steps -= tl.where(any_set(word_ptr, 2), 0, SPARE_STEPS)
    # as one loop with the inner one, the next tile's loads run under the end of this one
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), flatten=TAIL > 0):
        tile = first_tile + block // (OVER_M * OVER_O)
        # groups of GROUP_SIZE_M tiles along m share the tiles of w while they are in cache
        first_m = tile // group_tiles * GROUP_SIZE_M
        group_size = tl.minimum(num_tiles_m - first_m, GROUP_SIZE_M)
        start_m = ((first_m + tile % group_tiles % group_size) * OVER_M + block % OVER_M) * BLOCK_SIZE_M
        start_o = (tile % group_tiles // group_size * OVER_O + block // OVER_M % OVER_O) * BLOCK_SIZE_O
        offs_m = start_m + tl.arange(0, BLOCK_SIZE_M)

        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_O), dtype=tl.float32)
        for k in range(all_steps):
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
            if HAS_ROUNDED:
                projection_ptr = choose(word_ptr, rounded_ptr, projection_ptr)
            for r in range(0, R, BLOCK_SIZE_R):
                offs_r = r + tl.arange(0, BLOCK_SIZE_R)
                projection = load_matrix(projection_ptr, offs_m, offs_r, M, R, R, 1)
                factor = load_matrix(factor_ptr, offs_r, offs_o, R, O, stride_fr, stride_fo).to(tl.float32)
                high = projection.to(DTYPE)
                low_rank = dot_split(high, factor, low_rank, PRECISION)
                if HAS_WORD and not WIDE:  # as a third term of a tail
                    if any_set(word_ptr, 2):
                        low = (projection - high.to(tl.float32)).to(DTYPE)
                        low_rank = tl.dot(low, factor.to(DTYPE), low_rank)
            if HAS_DROPOUT:
                keep = keep_mask(tl.load(seed_ptr), offs_m, offs_o, dropout_p)
                acc += tl.where(keep, low_rank / (1.0 - dropout_p), 0.0)
            else:
                acc = low_rank

        if STORES == 2:  # halves need half of the shared memory on their way out
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_SIZE_M, 2, BLOCK_SIZE_O // 2)), (0, 2, 1)))
            scale_and_store(
                left, out, product, scale_ptr, bias_ptr, start_m, start_o, M, O, stand_in, out_stand_in,
                HAS_SCALE, HAS_BIAS, SAVE_PRODUCT, USE_DESCRIPTORS, DTYPE,
            )  # fmt: skip
            scale_and_store(
                right, out, product, scale_ptr, bias_ptr, start_m, start_o + BLOCK_SIZE_O // 2, M, O,
                stand_in, out_stand_in, HAS_SCALE, HAS_BIAS, SAVE_PRODUCT, USE_DESCRIPTORS, DTYPE,
            )  # fmt: skip
        else:
            scale_and_store(
                acc, out, product, scale_ptr, bias_ptr, start_m, start_o, M, O, stand_in, out_stand_in,
                HAS_SCALE, HAS_BIAS, SAVE_PRODUCT, USE_DESCRIPTORS, DTYPE,
            )  # fmt: skip


def scaled_gemm(
    t: Tensor,
    W: Tensor,
    parts: Tensor,
    rounded_parts: Tensor | None,
    factor: Tensor,
    inner: Tensor,
    word: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    stand_in: float,
    out_stand_in: float,
    save_product: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [M, O] in t's dtype, the product before the bias (out itself unless ``save_product``), the projection [M, R].

    t [M, C], W [O, C] (any strides), parts and rounded_parts as ``project`` leaves them of t and inner [C, R], factor
    [R, O], scale and bias [O]. ``word`` is what the norms say of cancelled lines, None with dropout, where none cancel.
    A zero scale counts as ``out_stand_in`` in the output, as ``stand_in`` in a product apart.
    """
    (M, C), O, R = t.shape, W.shape[0], parts.shape[-1]
    wide = not is_half(W.dtype)
    save_product = save_product and scale is not None
    out = empty((M, O), t.dtype, t.device)
    product = empty((M, O), t.dtype, t.device) if save_product else out
    rows_are_outputs = W.stride(1) == 1
    stored_w = W if rows_are_outputs else W.T
    descriptors_fit = W.dtype == t.dtype and all(map(fits_descriptor, (t, stored_w, out)))
    launches = gemm_config(M, O, C, t.dtype, W.get_device(), descriptors_fit, is_aligned(t), seed is not None)
    by_descriptors = launches[0][1]["USE_DESCRIPTORS"]
    rounded = t_tail = w_tail = None
    if by_descriptors and seed is None:
        projection, t_tail, w_tail = split_low_rank(parts, rounded_parts, factor, word, t.dtype, rows_are_outputs)
    else:
        projection, rounded = add_parts(parts, rounded_parts, word)
    tail, needed = 0 if t_tail is None else t_tail.shape[1], R * tail_terms(factor, t.dtype)

    if wide and word is not None:
        gemm_of_v(
            t, W, factor, inner, word, scale, bias, out, product, scaling=scaling,
            stand_in=stand_in, out_stand_in=out_stand_in, save_product=save_product, precision=precision,
        )  # fmt: skip
    for grid, config in launches:  # last: what the caller runs beside the product runs beside the longest of them
        operands: tuple = (t, W, None, None, out, product)
        block_m, block_o, block_c = config["BLOCK_SIZE_M"], config["BLOCK_SIZE_O"], config["BLOCK_SIZE_C"]
        if by_descriptors:
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
            (*operands, projection, rounded, factor, word, scale, bias, seed),
            M=M, O=O, C=C,
            stride_tm=t.stride(0), stride_tc=t.stride(1), stride_wo=W.stride(0), stride_wc=W.stride(1),
            stride_fr=factor.stride(0), stride_fo=factor.stride(1),
            stand_in=stand_in, out_stand_in=out_stand_in, dropout_p=dropout_p,
            R=R, TAIL=tail, SPARE_STEPS=cdiv(tail, block_c) - cdiv(min(tail, needed), block_c),
            HAS_WORD=word is not None, HAS_ROUNDED=rounded is not None, WIDE=wide,
            W_ROWS_ARE_OUTPUTS=rows_are_outputs, HAS_SCALE=scale is not None,
            HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None, SAVE_PRODUCT=save_product,
            DTYPE=TRITON_DTYPES[t.dtype], PRECISION=precision, **config, **overlapping(W.get_device()),
        )  # fmt: skip
    return out, product, projection


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
