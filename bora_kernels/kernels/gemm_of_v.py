"""The product of ``gemm`` made of V itself, where the update cancels lines of a float32 W.

There t·Wᵀ and projection·factor are large and nearly opposite: their float32 sum has few digits left, while a
product with the sum V of W and the update has all of them. The kernel runs before that of ``gemm``, and what the norms
say of cancelled lines decides on the device which of the two does the work; the other returns at once. It is a kernel
of its own because its registers would cost the other, which serves ordinary layers, a quarter of its speed.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import launch
from .common import any_set, dot_split, load_matrix
from .config import TRITON_DTYPES, cdiv, gemm_of_v_config, target
from .epilogue import scale_and_store


@triton.jit
def _gemm_of_v_kernel(
    t_ptr,  # [M, C]
    w_ptr,  # [O, C]
    out_ptr,  # [M, O], contiguous
    product_ptr,  # [M, O], contiguous
    factor_ptr,  # [R, O]
    inner_ptr,  # [C, R]: W + scaling·(inner·factor)ᵀ is V
    word_ptr,  # [2]: not 0 where lines are cancelled
    scale_ptr,  # [O]
    bias_ptr,  # [O]
    M, O, C,
    stride_tm, stride_tc, stride_wo, stride_wc, stride_fr, stride_fo, stride_ic, stride_ir,
    scaling, stand_in, out_stand_in,
    R: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_O: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRODUCT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles_o = tl.cdiv(O, BLOCK_SIZE_O)
    num_tiles = tl.where(any_set(word_ptr, 2), tl.cdiv(M, BLOCK_SIZE_M) * num_tiles_o, 0)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        start_m, start_o = tile // num_tiles_o * BLOCK_SIZE_M, tile % num_tiles_o * BLOCK_SIZE_O
        offs_m, offs_o = start_m + tl.arange(0, BLOCK_SIZE_M), start_o + tl.arange(0, BLOCK_SIZE_O)
        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_O), dtype=tl.float32)
        for start_c in tl.range(0, C, BLOCK_SIZE_C):
            offs_c = start_c + tl.arange(0, BLOCK_SIZE_C)
            update = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_O), dtype=tl.float32)
            for r in tl.range(0, R, BLOCK_SIZE_R):
                offs_r = r + tl.arange(0, BLOCK_SIZE_R)
                inner = load_matrix(inner_ptr, offs_c, offs_r, C, R, stride_ic, stride_ir).to(tl.float32)
                factor = load_matrix(factor_ptr, offs_r, offs_o, R, O, stride_fr, stride_fo).to(tl.float32)
                update = tl.dot(inner, factor, update, input_precision="ieee")
            w = load_matrix(w_ptr, offs_c, offs_o, C, O, stride_wc, stride_wo).to(tl.float32)
            t = load_matrix(t_ptr, offs_m, offs_c, M, C, stride_tm, stride_tc)
            acc = dot_split(t, w + scaling * update, acc, PRECISION)
        scale_and_store(
            acc, out_ptr, product_ptr, scale_ptr, bias_ptr, start_m, start_o, M, O, stand_in, out_stand_in,
            HAS_SCALE, HAS_BIAS, SAVE_PRODUCT, False, DTYPE,
        )  # fmt: skip


def gemm_of_v(
    t: Tensor,
    W: Tensor,
    factor: Tensor,
    inner: Tensor,
    word: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    product: Tensor,
    *,
    scaling: float,
    stand_in: float,
    out_stand_in: float,
    save_product: bool,
    precision: str,
) -> None:
    """Where there is ``word``, out [M, O] = scale⊙(t·Vᵀ) + bias, and the product before the bias if it is saved.

    V = W + scaling·(inner·factor)ᵀ; the arguments are those of ``gemm.scaled_gemm``.
    """
    (M, C), (R, O) = t.shape, factor.shape
    config = gemm_of_v_config()
    tiles = cdiv(M, config["BLOCK_SIZE_M"]) * cdiv(O, config["BLOCK_SIZE_O"])
    launch(
        _gemm_of_v_kernel,
        (min(tiles, target(W.get_device())[1]),),
        (t, W, out, product, factor, inner, word, scale, bias),
        M=M, O=O, C=C,
        stride_tm=t.stride(0), stride_tc=t.stride(1), stride_wo=W.stride(0), stride_wc=W.stride(1),
        stride_fr=factor.stride(0), stride_fo=factor.stride(1), stride_ic=inner.stride(0), stride_ir=inner.stride(1),
        scaling=scaling, stand_in=stand_in, out_stand_in=out_stand_in,
        R=R, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, SAVE_PRODUCT=save_product,
        DTYPE=TRITON_DTYPES[t.dtype], PRECISION=precision, **config,
    )  # fmt: skip
