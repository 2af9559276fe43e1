"""How a product leaves its kernel: scaled, with a bias, in its dtype, before the bias as well where that is kept."""

import triton
import triton.language as tl

from .common import load_vector


@triton.jit
def scale_and_store(
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
