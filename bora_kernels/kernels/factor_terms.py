"""A factor as two bfloat16 terms, and its Gram matrix of them: what comes before reads of W0 for many ranks.

Products with W0 take a factor c⊙Z [J, R], float32, as a sum of two bfloat16 numbers. Where ranks are many, each tile of
terms would be made by many programs, and a product whose operands were made in registers waits for them. So they
are made once, and lie as a matrix that tensor descriptors address.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import load_matrix, load_vector, store_matrix, two_terms
from .config import cdiv, target
from .gemm import descriptor
from .moments_config import factor_terms_config, gram_of_terms_config
from .overlap import overlapping, wait_for_last

ROWS = 64  # a step of the products with terms takes no more, and never rows of two terms


class Terms(NamedTuple):
    """Two terms of c⊙Z, and of Z. The second lies ``over`` rows or columns from the first."""

    matrix: Tensor  # [.., width], bfloat16; rows of a term are 0 from J on, and columns from R on
    over: tuple[int, int]
    plain: int  # the row where terms of Z begin: 0 without a coefficient


@triton.jit
def _factor_terms_kernel(
    z_ptr,  # [J, R]
    coefficient_ptr,  # [J]
    terms_ptr,  # [.., WIDTH]: ``rows`` of each term, of which those from J on are 0
    J, rows, second, plain,
    stride_zj, stride_zr,
    R: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE_J: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    offs_j = tl.program_id(0) * BLOCK_SIZE_J + tl.arange(0, BLOCK_SIZE_J)
    offs_r = tl.program_id(1) * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    z = load_matrix(z_ptr, offs_j, offs_r, J, R, stride_zj, stride_zr).to(tl.float32)
    if HAS_COEFFICIENT:
        high, low = two_terms(z, tl.bfloat16)
        store_matrix(terms_ptr + plain, high, offs_j, offs_r, rows, COLUMNS, WIDTH, 1)
        store_matrix(terms_ptr + plain + second, low, offs_j, offs_r, rows, COLUMNS, WIDTH, 1)
        z *= load_vector(coefficient_ptr, offs_j, J)[:, None]
    high, low = two_terms(z, tl.bfloat16)
    store_matrix(terms_ptr, high, offs_j, offs_r, rows, COLUMNS, WIDTH, 1)
    store_matrix(terms_ptr + second, low, offs_j, offs_r, rows, COLUMNS, WIDTH, 1)


def terms_of(Z: Tensor, coefficient: Tensor | None, beside: int) -> Terms:
    """Terms below each other, or, if ``beside`` is not 0, beside each other so many columns apart."""
    J, R = Z.shape
    columns = beside or cdiv(R, 8) * 8  # rows of whole 16 bytes; the columns from R on are 0
    rows = cdiv(J, ROWS) * ROWS
    width, over = (2 * columns, (0, columns)) if beside else (columns, (rows, 0))
    plain = 0 if coefficient is None else rows if beside else 2 * rows
    terms = empty((plain + (rows if beside else 2 * rows), width), torch.bfloat16, Z.device)
    config = factor_terms_config()
    launch(
        _factor_terms_kernel,
        (cdiv(rows, config["BLOCK_SIZE_J"]), cdiv(columns, config["BLOCK_SIZE_R"])),
        (Z, coefficient, terms),
        J=J, rows=rows, second=over[0] * width + over[1], plain=plain * width,
        stride_zj=Z.stride(0), stride_zr=Z.stride(1),
        R=R, COLUMNS=columns, WIDTH=width, HAS_COEFFICIENT=coefficient is not None,
        **config, **overlapping(Z.get_device(), early=False),
    )  # fmt: skip
    return Terms(terms, over, plain)


@triton.jit(do_not_specialize=["rows_over", "columns_over", "plain"])
def _gram_of_terms_kernel(
    terms,  # [.., WIDTH]; a tensor descriptor with USE_DESCRIPTORS
    grams_ptr,  # [splits, R, R]
    rows, split_size, rows_over, columns_over, plain,
    R: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE_J: tl.constexpr, BLOCK_SIZE_R: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    g, r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if g <= r:  # the others are their transposes
        start_g, start_r = g * BLOCK_SIZE_R, r * BLOCK_SIZE_R
        start, end = split * split_size, tl.minimum((split + 1) * split_size, rows)
        steps = tl.cdiv(end - start, BLOCK_SIZE_J)
        # tensor cores round each addition down, so that squares add up to a bias: small terms have a sum of their own
        acc = tl.zeros((BLOCK_SIZE_R, BLOCK_SIZE_R), dtype=tl.float32)
        for k in range(steps):
            j = start + k * BLOCK_SIZE_J
            z = _tile(terms, plain + j, start_g, WIDTH, BLOCK_SIZE_J, BLOCK_SIZE_R, USE_DESCRIPTORS)
            weighted = _tile(terms, j, start_r, WIDTH, BLOCK_SIZE_J, BLOCK_SIZE_R, USE_DESCRIPTORS)
            acc = tl.dot(z.T, weighted, acc)
        low = tl.zeros((BLOCK_SIZE_R, BLOCK_SIZE_R), dtype=tl.float32)
        for k in range(3 * steps):
            j, pair = start + k // 3 * BLOCK_SIZE_J, k % 3 + 1
            row, column = pair // 2 * rows_over, pair // 2 * columns_over
            z = _tile(terms, plain + j + row, start_g + column, WIDTH, BLOCK_SIZE_J, BLOCK_SIZE_R, USE_DESCRIPTORS)
            row, column = pair % 2 * rows_over, pair % 2 * columns_over
            weighted = _tile(terms, j + row, start_r + column, WIDTH, BLOCK_SIZE_J, BLOCK_SIZE_R, USE_DESCRIPTORS)
            low = tl.dot(z.T, weighted, low)
        acc += low
        grams_ptr += split.to(tl.int64) * R * R
        offs_g, offs_r = start_g + tl.arange(0, BLOCK_SIZE_R), start_r + tl.arange(0, BLOCK_SIZE_R)
        store_matrix(grams_ptr, acc, offs_g, offs_r, R, R, R, 1)
        if g < r:
            store_matrix(grams_ptr, acc, offs_g, offs_r, R, R, 1, R)


@triton.jit
def _tile(
    terms, row, column,
    WIDTH: tl.constexpr, BLOCK_SIZE_J: tl.constexpr, BLOCK_SIZE_R: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    if USE_DESCRIPTORS:
        tile = terms.load([row, column])
    else:
        offs_j, offs_r = row + tl.arange(0, BLOCK_SIZE_J), column + tl.arange(0, BLOCK_SIZE_R)
        tile = load_matrix(terms, offs_j, offs_r, row + BLOCK_SIZE_J, WIDTH, WIDTH, 1)
    return tile


def gram_of_terms(terms: Terms, J: int, R: int) -> Tensor:
    """Parts of Zᵀ·(c⊙Z) [splits, R, R]."""
    matrix, device = terms.matrix, terms.matrix.device
    arch, processors = target(matrix.get_device())
    splits, config = gram_of_terms_config(arch, processors, J, R)
    block_j, block_r = config["BLOCK_SIZE_J"], config["BLOCK_SIZE_R"]
    grams = empty((splits, R, R), torch.float32, device)
    operand = descriptor(matrix, [block_j, block_r]) if config["USE_DESCRIPTORS"] else matrix
    launch(
        _gram_of_terms_kernel,
        (cdiv(R, block_r), cdiv(R, block_r), splits),
        (operand, grams),
        rows=cdiv(J, ROWS) * ROWS, split_size=cdiv(cdiv(J, block_j), splits) * block_j,
        rows_over=terms.over[0], columns_over=terms.over[1], plain=terms.plain,
        R=R, WIDTH=matrix.shape[1], **config, **overlapping(matrix.get_device()),
    )  # fmt: skip
    return grams
