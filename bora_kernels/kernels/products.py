"""Products with the adapted weight, equation (a) of ``moments``, before norms are finished: for many ranks.

P·G over tiles of rows and ranks takes as many programs as fill the device. What finishes norms has a program for each
block of rows, which would make the product for all ranks, one tile after the other.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import launch
from .common import load_matrix, store_matrix, sum_parts, two_terms
from .config import cdiv
from .gram import add_gram
from .moments import moments
from .moments_config import products_config
from .moments_of_terms import moments_of_terms, takes_terms
from .overlap import overlapping, wait_for_last


@triton.jit(do_not_specialize=["splits"])
def _products_kernel(
    products_ptr,  # [splits, I + R, R]: parts of X, and below the first G
    squares_ptr,  # [splits + groups of ranks, I]: s·Σ_r P⊙(X + products) over a group goes behind the parts
    p_ptr,  # [I, R]
    out_ptr,  # [I, R]: products; X of the first split may lie there
    splits, I,
    stride_pi, stride_pr,
    scaling,
    R: tl.constexpr,
    BLOCK_SIZE_I: tl.constexpr, BLOCK_SIZE_R: tl.constexpr, BLOCK_SIZE_Q: tl.constexpr,
    HAS_SQUARES: tl.constexpr, HAS_OUT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    pid_r = tl.program_id(0)
    offs_r = pid_r * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    offs_i = tl.program_id(1) * BLOCK_SIZE_I + tl.arange(0, BLOCK_SIZE_I)
    p_g = tl.zeros((BLOCK_SIZE_I, BLOCK_SIZE_R), dtype=tl.float32)
    for q in range(0, R, BLOCK_SIZE_Q):
        offs_q = q + tl.arange(0, BLOCK_SIZE_Q)
        p = load_matrix(p_ptr, offs_i, offs_q, I, R, stride_pi, stride_pr).to(tl.float32)
        g = load_matrix(products_ptr + I * R, offs_q, offs_r, R, R, R, 1)
        # as exact as three TF32 products, and faster
        p_1, p_2, p_3 = _three_terms(p)
        g_1, g_2, g_3 = _three_terms(g)
        p_g = tl.dot(p_3, g_1, p_g)  # the smallest first
        p_g = tl.dot(p_1, g_3, p_g)
        p_g = tl.dot(p_2, g_2, p_g)
        p_g = tl.dot(p_2, g_1, p_g)
        p_g = tl.dot(p_1, g_2, p_g)
        p_g = tl.dot(p_1, g_1, p_g)
    x = sum_parts(products_ptr, (I + R) * R, splits, offs_i, offs_r, I, R)
    products = x + scaling * p_g
    if HAS_SQUARES:
        p = load_matrix(p_ptr, offs_i, offs_r, I, R, stride_pi, stride_pr).to(tl.float32)
        sums = scaling * tl.sum(p * (x + products), axis=1)
        tl.store(squares_ptr + (splits + pid_r).to(tl.int64) * I + offs_i, sums, mask=offs_i < I)
    if HAS_OUT:
        tl.debug_barrier()  # other threads have read X, of which no other program reads this tile
        store_matrix(out_ptr, products, offs_i, offs_r, I, R, R, 1)


@triton.jit
def _three_terms(value):
    """float32 as a sum of three bfloat16 numbers."""
    first = value.to(tl.bfloat16)
    second, third = two_terms(value - first.to(tl.float32), tl.bfloat16)
    return first, second, third


def make_products(products: Tensor, squares: Tensor | None, P: Tensor, out: Tensor | None, *, scaling: float) -> None:
    """From the sums of ``moments_of_terms`` products [I, R], to ``out``, and what completes squares."""
    (I, R), config = P.shape, products_config(P.shape[1])
    launch(
        _products_kernel,
        (cdiv(R, config["BLOCK_SIZE_R"]), cdiv(I, config["BLOCK_SIZE_I"])),
        (products, squares, P, out),
        splits=len(products), I=I, stride_pi=P.stride(0), stride_pr=P.stride(1), scaling=scaling,
        R=R, HAS_SQUARES=squares is not None, HAS_OUT=out is not None, **config, **overlapping(P.get_device()),
    )  # fmt: skip


class Sums(NamedTuple):
    """Parts of the sums over V, and how far they are added up."""

    products: Tensor | None  # [splits, I + R, R]: of X and G
    squares: Tensor | None  # [splits + groups, I]
    splits: int
    gram_parts: int
    groups: int  # of ranks, for which products are made, and what completes squares; 0: not made


NO_SUMS = Sums(None, None, 0, 0, 0)


def sums_over(
    W: Tensor,
    P: Tensor,
    Z: Tensor,
    coefficient: Tensor | None,
    scaling: float,
    precision: str,
    *,
    squares_needed: bool = True,
    cleared: Tensor | None = None,
    out: Tensor | None = None,
    in_place: bool = False,
) -> Sums:
    """Over V = W [I, J] + s·P [I, R]·Z [J, R]ᵀ; products go to ``out``, or over X, if they are made here at all."""
    I, R = P.shape
    if not takes_terms(W, R):
        products, squares = moments(W, Z, coefficient, precision, squares_needed, cleared)
        return Sums(products, squares, len(products), add_gram(products, I), 0)
    groups = cdiv(R, products_config(R)["BLOCK_SIZE_R"])
    products, squares = moments_of_terms(W, Z, coefficient, squares_needed, cleared, groups)
    make_products(products, squares, P, products if in_place else out, scaling=scaling)
    return Sums(products, squares, len(products), 1, groups)
