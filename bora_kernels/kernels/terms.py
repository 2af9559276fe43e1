"""A float32 matrix in half precision, laid out for products that load it and do nothing else with it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import load_matrix, load_vector, store_matrix, two_terms
from .config import TRITON_DTYPES, cdiv
from .overlap import overlapping, wait_for_last


@triton.jit
def _terms_kernel(
    factor_ptr,  # [C, R]
    scale_ptr,  # [C]
    terms_ptr,  # [C, TERMS·R], see ``terms_of``
    C, columns,
    stride_fc, stride_fr, stride_tc,
    R: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_SCALE: tl.constexpr, OVERLAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    offs_c = tl.program_id(0) * BLOCK_SIZE_C + tl.arange(0, BLOCK_SIZE_C)
    start_r = tl.program_id(1) * BLOCK_SIZE_R
    offs_r = start_r + tl.arange(0, BLOCK_SIZE_R)
    factor = load_matrix(factor_ptr, offs_c, offs_r, C, R, stride_fc, stride_fr).to(tl.float32)
    if HAS_SCALE:
        factor *= load_vector(scale_ptr, offs_c, C)[:, None]
    high, low = two_terms(factor, DTYPE)
    offs_t = start_r // GROUP * GROUP * (TERMS - 1) + offs_r  # of the high term
    store_matrix(terms_ptr, high, offs_c, offs_t, C, columns, stride_tc, 1)
    if TERMS == 2:
        store_matrix(terms_ptr, low, offs_c, GROUP + offs_t, C, columns, stride_tc, 1)


def terms_of(factor: Tensor, scale: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """[high | low] of scale⊙factor [C, R] for each ``group`` of ranks, a power of two: [C, 2R] in whole groups.

    high + low = scale⊙factor to twice the digits of the dtype; columns without a rank are zero.
    """
    C, R = factor.shape
    terms = empty((C, 2 * group * cdiv(R, group)), dtype, factor.device)
    _split(factor, scale, terms, 2, group)
    return terms


def high_term(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix [C, R] in half precision, in rows at multiples of 16 bytes."""
    C, R = matrix.shape
    high = empty((C, cdiv(R, 8) * 8), dtype, matrix.device)[:, :R]
    _split(matrix, None, high, 1, 16)
    return high


def _split(factor: Tensor, scale: Tensor | None, terms: Tensor, count: int, group: int) -> None:
    C, R = factor.shape
    block_c, block_r = 32, min(64, group if count == 2 else max(16, 1 << (R - 1).bit_length()))
    launch(
        _terms_kernel,
        (cdiv(C, block_c), cdiv(terms.shape[1] // count, block_r)),
        (factor, scale, terms),
        C=C, columns=terms.shape[1], stride_fc=factor.stride(0), stride_fr=factor.stride(1), stride_tc=terms.stride(0),
        R=R, TERMS=count, GROUP=group, BLOCK_SIZE_C=block_c, BLOCK_SIZE_R=block_r, HAS_SCALE=scale is not None,
        DTYPE=TRITON_DTYPES[terms.dtype], num_warps=4, **overlapping(factor.get_device(), early=False),
    )  # fmt: skip
