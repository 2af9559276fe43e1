"""Sums over the adapted weight V from one streaming read of W0.

Norms and the exact gradient's paths through them (``norms``) need, of V = W0 + s·P·Zᵀ [I, J] with P [I, R], Z [J, R]
and a coefficient c [J], always the same two sums:

    products_i = Σ_j V_ij·c_j·Z_j   [R]        squares_i = Σ_j c_j·V_ij²

V itself is not formed, as a rule. With X = W0·(c⊙Z) and the Gram matrix G = Zᵀ·(c⊙Z) [R, R] they are

    (a) products = X + s·P·G                   (b) squares = Σ_j c_j·W0_ij² + s·Σ_r P⊙(X + products)

``moments`` reads W0 once and leaves X, G and Σ_j c_j·W0_ij², in parts that a finishing kernel adds in a fixed order, by
``load_products`` and ``load_squares``. Over the other axis it is the same kernel on the transposed view.

Where the update cancels lines of W0, (a) and (b) are differences of large numbers, and ``sums_of_v`` forms V.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import dot_split, load_matrix, load_vector, sum_parts, sum_vectors, two_terms
from .config import TRITON_DTYPES, cdiv, is_aligned, is_packed, memory_rate, target
from .moments_config import moments_config
from .overlap import overlapping, wait_for_last


@triton.jit
def _moments_kernel(
    w_ptr,  # [I, J]; TRANSPOSED says that i is the inner axis
    z_ptr,  # [J, R]
    coefficient_ptr,  # [J]
    products_ptr,  # [splits, I + R, R]: X, and below it G
    squares_ptr,  # [splits, I]
    cleared_ptr,  # [4]: set to 0
    I, J, split_size,
    stride_wi, stride_wj, stride_zj, stride_zr,
    R: tl.constexpr,
    BLOCK_SIZE_I: tl.constexpr, BLOCK_SIZE_J: tl.constexpr, BLOCK_SIZE_R: tl.constexpr, BLOCK_SIZE_G: tl.constexpr,
    STAGES: tl.constexpr, ADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr, PACKED: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr, HAS_SQUARES: tl.constexpr, HAS_CLEARED: tl.constexpr,
    OVERLAP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    if PACKED:
        stride_zj = R
    pid_i, split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if HAS_CLEARED:
        if pid_i + split + pid_r == 0:
            tl.store(cleared_ptr + tl.arange(0, 4), tl.zeros((4,), dtype=tl.float32))
    offs_r = pid_r * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    start, end = split * split_size, tl.minimum((split + 1) * split_size, J)
    products_ptr += split.to(tl.int64) * (I + R) * R
    gram_blocks = tl.cdiv(R, BLOCK_SIZE_G)
    if pid_i < gram_blocks:  # first, since nobody is to wait for them
        offs_g = pid_i * BLOCK_SIZE_G + tl.arange(0, BLOCK_SIZE_G)
        gram = _gram(
            z_ptr, coefficient_ptr, offs_g, offs_r, start, end, J, stride_zj, stride_zr,
            R, BLOCK_SIZE_J, STAGES, HAS_COEFFICIENT, DTYPE, PRECISION,
        )  # fmt: skip
        gram_ptrs = products_ptr + (I + offs_g).to(tl.int64)[:, None] * R + offs_r[None, :]
        tl.store(gram_ptrs, gram, mask=(offs_g < R)[:, None] & (offs_r < R)[None, :])
    else:
        offs_i = (pid_i - gram_blocks) * BLOCK_SIZE_I + tl.arange(0, BLOCK_SIZE_I)
        x, squares = _sums_of_w(
            w_ptr, z_ptr, coefficient_ptr, offs_i, offs_r, start, end, I, J, stride_wi, stride_wj, stride_zj, stride_zr,
            R, BLOCK_SIZE_J, STAGES, ADDED, TRANSPOSED, HAS_COEFFICIENT, HAS_SQUARES,
            DTYPE, PRECISION,
        )  # fmt: skip
        if HAS_SQUARES:
            if pid_r == 0:  # a branch: Triton 3.9's interpreter takes no mask of a block and a scalar
                tl.store(squares_ptr + split.to(tl.int64) * I + offs_i, squares, mask=offs_i < I)
        ptrs = products_ptr + offs_i.to(tl.int64)[:, None] * R + offs_r[None, :]
        tl.store(ptrs, x, mask=(offs_i < I)[:, None] & (offs_r < R)[None, :])


@triton.jit
def _sums_of_w(
    w_ptr, z_ptr, coefficient_ptr, offs_i, offs_r, start, end, I, J, stride_wi, stride_wj, stride_zj, stride_zr,
    R: tl.constexpr, BLOCK_SIZE_J: tl.constexpr, STAGES: tl.constexpr,
    ADDED: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr, HAS_SQUARES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X [offs_i, offs_r] and Σ_j c_j·W_ij² over j from start to end, a multiple of BLOCK_SIZE_J away."""
    # the factor's two terms side by side, for one product in place of two, where the accumulator is small
    JOINED: tl.constexpr = DTYPE != tl.float32 and offs_r.shape[0] <= 32
    acc = tl.zeros((offs_i.shape[0], 2 * offs_r.shape[0] if JOINED else offs_r.shape[0]), dtype=tl.float32)
    # ADDED neighbours that one thread has are added at once, the others after the loop
    parts: tl.constexpr = BLOCK_SIZE_J // ADDED
    squares = tl.zeros((parts, offs_i.shape[0]) if TRANSPOSED else (offs_i.shape[0], parts), dtype=tl.float32)
    for j in tl.range(start, end, BLOCK_SIZE_J, num_stages=STAGES):  # said here, it holds for loads of c as well
        offs_j = j + tl.arange(0, BLOCK_SIZE_J)
        if TRANSPOSED:
            stored = load_matrix(w_ptr, offs_j, offs_i, J, I, stride_wj, stride_wi)
            tile = stored.T
        else:
            stored = load_matrix(w_ptr, offs_i, offs_j, I, J, stride_wi, stride_wj)
            tile = stored
        z = load_matrix(z_ptr, offs_j, offs_r, J, R, stride_zj, stride_zr).to(tl.float32)
        if HAS_COEFFICIENT:
            z *= load_vector(coefficient_ptr, offs_j, J)[:, None]
        if JOINED:
            high = z.to(DTYPE).to(tl.float32)
            terms = tl.reshape(tl.join(high, z - high), (BLOCK_SIZE_J, 2 * offs_r.shape[0]))
            acc = tl.dot(tile.to(DTYPE), terms.to(DTYPE), acc)  # cast last: Triton 3.6 stores no reshaped tile itself
        else:
            acc = dot_split(tile.to(DTYPE), z, acc, PRECISION)
        if HAS_SQUARES:
            wide = stored.to(tl.float32)
            weighted = wide
            if HAS_COEFFICIENT:
                c = load_vector(coefficient_ptr, offs_j, J)
                weighted = wide * (c[:, None] if TRANSPOSED else c[None, :])
            if TRANSPOSED:
                squares += tl.sum(tl.reshape(wide * weighted, (ADDED, parts, offs_i.shape[0])), axis=0)
            else:
                squares += tl.sum(tl.reshape(wide * weighted, (offs_i.shape[0], parts, ADDED)), axis=2)
    if JOINED:
        acc = tl.sum(tl.reshape(acc, (offs_i.shape[0], offs_r.shape[0], 2)), axis=2)
    return acc, tl.sum(squares, axis=0 if TRANSPOSED else 1)


@triton.jit
def _gram(
    z_ptr, coefficient_ptr, offs_g, offs_r, start, end, J, stride_zj, stride_zr,
    R: tl.constexpr, BLOCK_SIZE_J: tl.constexpr, STAGES: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G [offs_g, offs_r] over j from start to end; both factors as two terms."""
    acc = tl.zeros((offs_g.shape[0], offs_r.shape[0]), dtype=tl.float32)
    for j in tl.range(start, end, BLOCK_SIZE_J, num_stages=STAGES):
        offs_j = j + tl.arange(0, BLOCK_SIZE_J)
        z_t = load_matrix(z_ptr, offs_g, offs_j, R, J, stride_zr, stride_zj).to(tl.float32)
        z = load_matrix(z_ptr, offs_j, offs_r, J, R, stride_zj, stride_zr).to(tl.float32)
        if HAS_COEFFICIENT:
            z *= load_vector(coefficient_ptr, offs_j, J)[:, None]
        if DTYPE == tl.float32:
            acc = tl.dot(z_t, z, acc, input_precision=PRECISION)
        else:
            high_t, low_t = two_terms(z_t, DTYPE)
            high, low = two_terms(z, DTYPE)
            part = tl.dot(high_t, high)
            part = tl.dot(high_t, low, part)
            part = tl.dot(low_t, high, part)
            acc += tl.dot(low_t, low, part)  # here, since tensor cores round a sum down: squares add up to a bias
    return acc


@triton.jit
def load_products(
    products_ptr, p_ptr, offs_i, offs_r, splits, gram_parts, I, stride_pi, stride_pr, scaling,
    R: tl.constexpr, BLOCK_SIZE_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X and products, equation (a), for a block of rows and of ranks."""
    x = sum_parts(products_ptr, (I + R) * R, splits, offs_i, offs_r, I, R)
    p_g = tl.zeros((offs_i.shape[0], BLOCK_SIZE_R), dtype=tl.float32)
    for r in range(0, R, BLOCK_SIZE_R):
        offs_q = r + tl.arange(0, BLOCK_SIZE_R)
        p = load_matrix(p_ptr, offs_i, offs_q, I, R, stride_pi, stride_pr).to(tl.float32)
        g = sum_parts(products_ptr + I * R, (I + R) * R, gram_parts, offs_q, offs_r, R, R)
        p_g = tl.dot(p, g, p_g, input_precision=PRECISION)
    return x, x + scaling * p_g


@triton.jit
def load_squares(squares_ptr, offs_i, splits, I):
    return sum_vectors(squares_ptr, I, splits, offs_i, I)


@triton.jit
def sums_of_v(
    mask, products_ptr, w_ptr, p_ptr, z_ptr, c_ptr, offs_i, I, J,
    stride_wi, stride_wj, stride_pi, stride_pr, stride_zj, stride_zr,
    scaling,
    R: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_COEFFICIENT: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """squares from V itself, and products to products_ptr [I, R] for the lines in mask: slow, and right."""
    squares = tl.zeros((offs_i.shape[0],), dtype=tl.float32)
    for r in range(0, R if HAS_PRODUCTS else 1, BLOCK_SIZE):
        offs_r = r + tl.arange(0, BLOCK_SIZE)
        squares = tl.zeros((offs_i.shape[0],), dtype=tl.float32)
        products = tl.zeros((offs_i.shape[0], BLOCK_SIZE), dtype=tl.float32)
        for j in tl.range(0, J, BLOCK_SIZE, num_stages=1):  # rare: no registers for a pipeline
            offs_j = j + tl.arange(0, BLOCK_SIZE)
            low_rank = tl.zeros((offs_i.shape[0], BLOCK_SIZE), dtype=tl.float32)
            for q in tl.range(0, R, BLOCK_SIZE, num_stages=1):
                offs_q = q + tl.arange(0, BLOCK_SIZE)
                p = load_matrix(p_ptr, offs_i, offs_q, I, R, stride_pi, stride_pr).to(tl.float32)
                z = load_matrix(z_ptr, offs_q, offs_j, R, J, stride_zr, stride_zj).to(tl.float32)
                low_rank = tl.dot(p, z, low_rank, input_precision="ieee")
            v = load_matrix(w_ptr, offs_i, offs_j, I, J, stride_wi, stride_wj).to(tl.float32) + scaling * low_rank
            weighted = v * load_vector(c_ptr, offs_j, J)[None, :] if HAS_COEFFICIENT else v
            squares += tl.sum(weighted * v, axis=1)
            if HAS_PRODUCTS:
                z = load_matrix(z_ptr, offs_j, offs_r, J, R, stride_zj, stride_zr).to(tl.float32)
                products = tl.dot(weighted, z, products, input_precision="ieee")
        if HAS_PRODUCTS:
            ptrs = products_ptr + offs_i.to(tl.int64)[:, None] * R + offs_r[None, :]
            tl.store(ptrs, products, mask=(mask & (offs_i < I))[:, None] & (offs_r < R)[None, :])
    return squares


def moments(
    W: Tensor,
    Z: Tensor,
    coefficient: Tensor | None,
    precision: str,
    squares_needed: bool = True,
    cleared: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Parts of X and G [splits, I + R, R] and of Σ_j c_j·W_ij² [splits, I]; sets ``cleared`` [4] to 0."""
    (I, J), R = W.shape, Z.shape[1]
    transposed = W.stride(0) == 1 and W.stride(1) != 1
    arch, processors = target(W.get_device())
    splits, config = moments_config(
        arch, processors, I, J, R, W.dtype, is_aligned(W), transposed, squares_needed, memory_rate(W.get_device())
    )
    block_i, block_j, block_r = config["BLOCK_SIZE_I"], config["BLOCK_SIZE_J"], config["BLOCK_SIZE_R"]
    products = empty((splits, I + R, R), torch.float32, W.device)
    squares = empty((splits, I), torch.float32, W.device) if squares_needed else None
    # float16 has not the range of κ and λ, so its products are made in float32
    operand = torch.bfloat16 if W.dtype == torch.bfloat16 else torch.float32
    launch(
        _moments_kernel,
        (cdiv(R, config["BLOCK_SIZE_G"]) + cdiv(I, block_i), splits, cdiv(R, block_r)),
        (W, Z, coefficient, products, squares, cleared),
        I=I, J=J, split_size=cdiv(cdiv(J, splits), block_j) * block_j,
        stride_wi=W.stride(0), stride_wj=W.stride(1), stride_zj=Z.stride(0), stride_zr=Z.stride(1),
        R=R, TRANSPOSED=transposed, PACKED=is_packed(Z), HAS_COEFFICIENT=coefficient is not None,
        HAS_SQUARES=squares_needed, HAS_CLEARED=cleared is not None,
        DTYPE=TRITON_DTYPES[operand], PRECISION=precision, **config, **overlapping(W.get_device(), early=False),
    )  # fmt: skip
    return products, squares
