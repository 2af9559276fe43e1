"""The sums of ``moments`` where ranks are many: products of W0 with terms that lie ready, by tensor descriptors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import load_matrix, load_vector, store_matrix, sum_vectors
from .config import cdiv, target
from .factor_terms import gram_of_terms, terms_of
from .gemm import descriptor, fits_descriptor
from .moments_config import moments_of_terms_config
from .overlap import overlapping, wait_for_last


@triton.jit(do_not_specialize=["grams"])
def _moments_of_terms_kernel(
    w,  # [I, J], stored as [J, I] if TRANSPOSED; a tensor descriptor with USE_DESCRIPTORS, as is terms
    terms,  # [.., WIDTH], of c⊙Z: the second ones ``rows_over`` below the first, or beside them if JOINED
    w_ptr,  # the same as w
    coefficient_ptr,  # [J]
    grams_ptr,  # [grams, R, R]
    products_ptr,  # [splits, I + R, R]: X, and below that of the first split G
    squares_ptr,  # [splits, I]
    cleared_ptr,  # [4]: set to 0
    I, J, split_size, rows_over, grams,
    stride_wi, stride_wj,
    R: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE_I: tl.constexpr, BLOCK_SIZE_J: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    ADDED: tl.constexpr, JOINED: tl.constexpr, TRANSPOSED: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr, HAS_SQUARES: tl.constexpr, HAS_CLEARED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    pid_r, pid_i, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pid = (split * tl.num_programs(1) + pid_i) * tl.num_programs(0) + pid_r
    if HAS_CLEARED:
        if pid == 0:
            tl.store(cleared_ptr + tl.arange(0, 4), tl.zeros((4,), dtype=tl.float32))
    _add_grams(grams_ptr, products_ptr + I * R, grams, pid, R)
    start_i, start, end = pid_i * BLOCK_SIZE_I, split * split_size, tl.minimum((split + 1) * split_size, J)
    offs_i = start_i + tl.arange(0, BLOCK_SIZE_I)
    # a step multiplies one term, or both side by side: two products in a step would wait for each other
    TERMS: tl.constexpr = 1 if JOINED else 2
    COLUMNS: tl.constexpr = 2 * BLOCK_SIZE_R if JOINED else BLOCK_SIZE_R
    STEP: tl.constexpr = BLOCK_SIZE_J // TERMS  # columns of W0 whose squares a step adds
    PARTS: tl.constexpr = STEP // ADDED  # ADDED neighbours that one thread has are added at once
    acc = tl.zeros((BLOCK_SIZE_I, COLUMNS), dtype=tl.float32)
    squares = tl.zeros((PARTS, BLOCK_SIZE_I) if TRANSPOSED else (BLOCK_SIZE_I, PARTS), dtype=tl.float32)
    # Squares take tiles of their own, from cache, a step ahead: Triton lets the memory of a tile that was read into
    # registers be overwritten while a product still reads it. One group of ranks adds them, the others load nothing.
    end_of_squares = tl.where(pid_r == 0, end, 0)
    if HAS_SQUARES:
        stored, c = _tile(
            w_ptr, coefficient_ptr, offs_i, start, I, end_of_squares, stride_wi, stride_wj,
            STEP, TRANSPOSED, HAS_COEFFICIENT,
        )  # fmt: skip
    for k in range(TERMS * tl.cdiv(end - start, BLOCK_SIZE_J)):
        j = start + k // TERMS * BLOCK_SIZE_J
        row, column = j + k % TERMS * rows_over, pid_r * COLUMNS
        if USE_DESCRIPTORS:
            if TRANSPOSED:
                tile = w.load([j, start_i]).T
            else:
                tile = w.load([start_i, j])
            term = terms.load([row, column])
        else:
            offs_j = tl.arange(0, BLOCK_SIZE_J)
            tile = load_matrix(w, offs_i, j + offs_j, I, end, stride_wi, stride_wj)
            term = load_matrix(terms, row + offs_j, column + tl.arange(0, COLUMNS), row + BLOCK_SIZE_J, WIDTH, WIDTH, 1)
        acc = tl.dot(tile, term, acc)
        if HAS_SQUARES:
            wide = stored.to(tl.float32)
            weighted = wide * c
            stored, c = _tile(
                w_ptr, coefficient_ptr, offs_i, start + (k + 1) * STEP, I, end_of_squares, stride_wi, stride_wj,
                STEP, TRANSPOSED, HAS_COEFFICIENT,
            )  # fmt: skip
            if TRANSPOSED:
                squares += tl.sum(tl.reshape(wide * weighted, (ADDED, PARTS, BLOCK_SIZE_I)), axis=0)
            else:
                squares += tl.sum(tl.reshape(wide * weighted, (BLOCK_SIZE_I, PARTS, ADDED)), axis=2)
    if JOINED:
        acc = tl.sum(tl.reshape(acc, (BLOCK_SIZE_I, 2, BLOCK_SIZE_R)), axis=1)
    if HAS_SQUARES:
        if pid_r == 0:
            sums = tl.sum(squares, axis=0 if TRANSPOSED else 1)
            tl.store(squares_ptr + split.to(tl.int64) * I + offs_i, sums, mask=offs_i < I)
    offs_r = pid_r * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    store_matrix(products_ptr + split.to(tl.int64) * (I + R) * R, acc, offs_i, offs_r, I, R, R, 1)


@triton.jit
def _add_grams(grams_ptr, gram_ptr, grams, pid, R: tl.constexpr):
    """Each program adds a share of the parts of G."""
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for first in range(pid * 512, R * R, programs * 512):
        offs = first + tl.arange(0, 512)
        tl.store(gram_ptr + offs, sum_vectors(grams_ptr, R * R, grams, offs, R * R), mask=offs < R * R)


@triton.jit
def _tile(
    w_ptr, coefficient_ptr, offs_i, j, I, end, stride_wi, stride_wj,
    STEP: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_COEFFICIENT: tl.constexpr,
):  # fmt: skip
    """A tile of W0 as it is stored, and the coefficients that it is weighted with."""
    offs_j = j + tl.arange(0, STEP)
    if TRANSPOSED:
        stored = load_matrix(w_ptr, offs_j, offs_i, end, I, stride_wj, stride_wi)
    else:
        stored = load_matrix(w_ptr, offs_i, offs_j, I, end, stride_wi, stride_wj)
    c = load_vector(coefficient_ptr, offs_j, end) if HAS_COEFFICIENT else tl.full((STEP,), 1.0, dtype=tl.float32)
    return stored, c[:, None] if TRANSPOSED else c[None, :]


def takes_terms(W: Tensor, R: int) -> bool:
    """Whether W0 is read by products with terms that were made before: bfloat16 and many ranks, on Hopper GPUs."""
    if R <= 64 or W.dtype != torch.bfloat16 or target(W.get_device())[0] not in (0, 90):
        return False
    return fits_descriptor(W if W.stride(1) == 1 else W.T)


def moments_of_terms(
    W: Tensor,
    Z: Tensor,
    coefficient: Tensor | None,
    squares_needed: bool = True,
    cleared: Tensor | None = None,
    groups: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Parts of X [splits, I + R, R], G below the first, and of Σ_j c_j·W_ij² [splits + groups, I], the groups unset.

    Sets ``cleared`` [4] to 0.
    """
    (I, J), R = W.shape, Z.shape[1]
    transposed = W.stride(1) != 1
    arch, processors = target(W.get_device())
    splits, config = moments_of_terms_config(arch, processors, I, J, R, transposed)
    block_i, block_j, block_r = config["BLOCK_SIZE_I"], config["BLOCK_SIZE_J"], config["BLOCK_SIZE_R"]
    columns, by_descriptors = 2 * block_r if config["JOINED"] else block_r, config["USE_DESCRIPTORS"]
    terms = terms_of(Z, coefficient, block_r if config["JOINED"] else 0)
    grams = gram_of_terms(terms, J, R)
    products = empty((splits, I + R, R), torch.float32, W.device)
    squares = empty((splits + groups, I), torch.float32, W.device) if squares_needed else None
    stored, block = (W.T, [block_j, block_i]) if transposed else (W, [block_i, block_j])
    operands: tuple = (W, terms.matrix)
    if by_descriptors:
        operands = (descriptor(stored, block), descriptor(terms.matrix, [block_j, columns]))
    launch(
        _moments_of_terms_kernel,
        (cdiv(R, block_r), cdiv(I, block_i), splits),
        (*operands, W, coefficient, grams, products, squares, cleared),
        I=I, J=J, split_size=cdiv(cdiv(J, block_j), splits) * block_j, rows_over=terms.over[0], grams=len(grams),
        stride_wi=W.stride(0), stride_wj=W.stride(1),
        R=R, WIDTH=terms.matrix.shape[1], TRANSPOSED=transposed, HAS_COEFFICIENT=coefficient is not None,
        HAS_SQUARES=squares_needed, HAS_CLEARED=cleared is not None, **config, **overlapping(W.get_device()),
    )  # fmt: skip
    return products, squares
