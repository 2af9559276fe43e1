"""Norms of the adapted weight, and the exact gradient's paths through them, from the sums of ``moments``.

The four uses of these, numbered as in ``ops.torch_backend``:

    first axis,  c = 1               first_norm, first_scale; V·Q is kept for (10)
    second axis, c = first_scale²    second_norm, second_scale; Vᵀ·(first_scale²⊙P) is kept for (11)
    first axis,  c = κ               (8), (9), (10)
    second axis, c = λ               (11)

Where the update cancels most of a line of W0, (b) cancels too: what is left has the error of Σ_j c_j·W0_ij², and may be
negative. The kernel that finishes a norm sees it by that sum, forms V for such a line, and leaves word of it: the field
``cancelled`` of ``contract.Scales``. By that line's scale and coefficients all sums over the other axis cancel as well,
and are taken from V where there is word. No launch is spent on it, and no time where there is no such line.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import any_set, live_magnitude, load_matrix, load_vector, store_matrix, sum_vectors
from .config import cdiv, finish_config, target
from .moments import load_products, load_squares, sums_of_v
from .overlap import overlapping, wait_for_last
from .products import NO_SUMS, sums_over


@triton.jit(do_not_specialize=["gram_parts", "groups"])
def _finish_norm_kernel(
    products_ptr,  # [splits, I + R, R]
    squares_ptr,  # [splits + groups, I]
    w_ptr,  # [I, J]
    p_ptr,  # [I, R]
    z_ptr,  # [J, R]
    c_ptr,  # [J]: the coefficient summed with
    magnitude_ptr,  # [I]
    norm_ptr,  # [I]
    scale_ptr,  # [I]
    coefficient_ptr,  # [I]: scale², or squares without a magnitude
    kept_ptr,  # [I, R]: products
    word_ptr,  # [FLAGS]: not 0 where lines of the axes before were cancelled
    cancelled_ptr,  # []: set to 1 where one of these lines is
    splits, gram_parts, groups, I, J,
    stride_wi, stride_wj, stride_pi, stride_pr, stride_zj, stride_zr,
    scaling, eps,
    R: tl.constexpr, BLOCK_SIZE_I: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr, HAS_MAGNITUDE: tl.constexpr, HAS_KEPT: tl.constexpr, APART: tl.constexpr,
    SIGNED: tl.constexpr, FLAGS: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    offs_i = tl.program_id(0) * BLOCK_SIZE_I + tl.arange(0, BLOCK_SIZE_I)
    mask_i = offs_i < I
    word = any_set(word_ptr, FLAGS)  # early: nobody waits for it
    of_w = load_squares(squares_ptr, offs_i, splits, I)
    squares = of_w
    if APART:  # products are made, and (b)
        squares += sum_vectors(squares_ptr + splits * I, I, groups, offs_i, I)
    for r in range(0, 0 if APART else R, BLOCK_SIZE_R):
        offs_r = r + tl.arange(0, BLOCK_SIZE_R)
        x, products = load_products(
            products_ptr, p_ptr, offs_i, offs_r, splits, gram_parts, I, stride_pi, stride_pr, scaling,
            R, BLOCK_SIZE_R, PRECISION,
        )  # fmt: skip
        p = load_matrix(p_ptr, offs_i, offs_r, I, R, stride_pi, stride_pr).to(tl.float32)
        squares += scaling * tl.sum(p * (x + products), axis=1)  # (b)
        if HAS_KEPT:
            store_matrix(kept_ptr, products, offs_i, offs_r, I, R, R, 1)
    if SIGNED:  # the sum may cancel where no line does
        cancelled = mask_i & (offs_i < 0)
    else:
        cancelled = squares * 4.0 < of_w  # half of the norm is gone
        if tl.max(cancelled.to(tl.int32), axis=0) > 0:
            tl.store(cancelled_ptr, 1.0)
    if word:
        cancelled = mask_i
    if tl.max(cancelled.to(tl.int32), axis=0) > 0:
        tl.debug_barrier()  # products of the same lines were stored above, by other threads
        seen = sums_of_v(
            cancelled, kept_ptr, w_ptr, p_ptr, z_ptr, c_ptr, offs_i, I, J,
            stride_wi, stride_wj, stride_pi, stride_pr, stride_zj, stride_zr,
            scaling, R, 16, HAS_COEFFICIENT, HAS_KEPT,
        )  # fmt: skip
        squares = tl.where(cancelled, seen, squares)
    if HAS_MAGNITUDE:
        squares = tl.where(squares < 0.0, 0.0, squares)  # by rounding, at most; NaN stays
        norm = tl.maximum(tl.sqrt(squares), eps, propagate_nan=tl.PropagateNan.ALL)
        scale = load_vector(magnitude_ptr, offs_i, I) / norm
        tl.store(norm_ptr + offs_i, norm, mask=mask_i)
        tl.store(scale_ptr + offs_i, scale, mask=mask_i)
        tl.store(coefficient_ptr + offs_i, scale * scale, mask=mask_i)
    else:
        tl.store(coefficient_ptr + offs_i, squares, mask=mask_i)


@triton.jit(do_not_specialize=["gram_parts", "groups"])
def _finish_path_kernel(
    products_ptr,  # [splits, I + R, R]; overwritten
    squares_ptr,  # [splits, I]
    w_ptr,  # [I, J]
    p_ptr,  # [I, R]
    z_ptr,  # [J, R]
    c_ptr,  # [J]: the coefficient summed with
    word_ptr,  # [2]: not 0 where lines are cancelled
    norm_ptr,  # [I]
    scale_ptr,  # [I]
    magnitude_ptr,  # [I]
    coefficient_ptr,  # [I]: −S / norm², replaced by λ on the first axis; κ on the second
    kept_ptr,  # [I, R]: V·Q, or Vᵀ·(first_scale²⊙P)
    d_magnitude_ptr,  # [I], added to
    d_factor_ptr,  # [I, R], added to
    splits, gram_parts, groups, I, J,
    stride_wi, stride_wj, stride_pi, stride_pr, stride_zj, stride_zr, stride_di, stride_dr,
    scaling, eps, stand_in,
    R: tl.constexpr, BLOCK_SIZE_I: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    FIRST: tl.constexpr, HAS_PRODUCTS: tl.constexpr, HAS_KEPT: tl.constexpr, HAS_FACTOR: tl.constexpr,
    APART: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    offs_i = tl.program_id(0) * BLOCK_SIZE_I + tl.arange(0, BLOCK_SIZE_I)
    mask_i = offs_i < I
    coefficient = load_vector(coefficient_ptr, offs_i, I) if FIRST or HAS_KEPT else tl.zeros_like(offs_i)
    weight_of_products = tl.full((BLOCK_SIZE_I,), 1.0, dtype=tl.float32)
    squares = tl.zeros((BLOCK_SIZE_I,), dtype=tl.float32)
    products = tl.zeros((BLOCK_SIZE_I, BLOCK_SIZE_R), dtype=tl.float32)
    if FIRST and HAS_PRODUCTS:  # early: nobody waits for them
        scale, norm = load_vector(scale_ptr, offs_i, I), load_vector(norm_ptr, offs_i, I)
        live = live_magnitude(scale_ptr, norm_ptr, magnitude_ptr, offs_i, I, stand_in)
        d_magnitude = load_vector(d_magnitude_ptr, offs_i, I)
    if HAS_PRODUCTS:
        from_v = any_set(word_ptr, 2)
        if FIRST:
            squares = load_squares(squares_ptr, offs_i, splits + groups, I)
            for r in range(0, 0 if APART else R, BLOCK_SIZE_R):
                offs_r = r + tl.arange(0, BLOCK_SIZE_R)
                x, products = load_products(
                    products_ptr, p_ptr, offs_i, offs_r, splits, gram_parts, I, stride_pi, stride_pr, scaling,
                    R, BLOCK_SIZE_R, PRECISION,
                )  # fmt: skip
                p = load_matrix(p_ptr, offs_i, offs_r, I, R, stride_pi, stride_pr).to(tl.float32)
                squares += scaling * tl.sum(p * (x + products), axis=1)  # (b): w of (8)
                if HAS_FACTOR and R > BLOCK_SIZE_R:
                    tl.debug_barrier()  # other threads have read X of the first split, which only this program reads
                    store_matrix(products_ptr, products, offs_i, offs_r, I, R, R, 1)
        if from_v:  # here, so that nobody waits for the word
            tl.debug_barrier()  # other threads have read X
            squares = sums_of_v(  # products lie over X
                mask_i, products_ptr, w_ptr, p_ptr, z_ptr, c_ptr, offs_i, I, J,
                stride_wi, stride_wj, stride_pi, stride_pr, stride_zj, stride_zr,
                scaling, R, 16, True, HAS_FACTOR,
            )  # fmt: skip
        tl.debug_barrier()  # other threads read them
    if FIRST and HAS_PRODUCTS:
        weight_of_products = scale * scale
        path = weight_of_products * squares
        coefficient -= tl.where(norm > eps, path / (norm * norm), 0.0)  # (9): λ
        tl.store(coefficient_ptr + offs_i, coefficient, mask=mask_i)
        tl.store(d_magnitude_ptr + offs_i, d_magnitude + path / live, mask=mask_i)  # (9)
    if HAS_FACTOR:  # (10), (11)
        for r in range(0, R, BLOCK_SIZE_R):
            offs_r = r + tl.arange(0, BLOCK_SIZE_R)
            update = tl.zeros((BLOCK_SIZE_I, BLOCK_SIZE_R), dtype=tl.float32)
            if HAS_KEPT:
                kept = load_matrix(kept_ptr, offs_i, offs_r, I, R, R, 1)
            if HAS_PRODUCTS:
                if APART:
                    products = load_matrix(products_ptr, offs_i, offs_r, I, R, R, 1)
                elif from_v | (FIRST and R > BLOCK_SIZE_R):
                    products = load_matrix(products_ptr, offs_i, offs_r, I, R, R, 1)
                elif not FIRST:  # else they are at hand
                    _, products = load_products(
                        products_ptr, p_ptr, offs_i, offs_r, splits, gram_parts, I, stride_pi, stride_pr, scaling,
                        R, BLOCK_SIZE_R, PRECISION,
                    )  # fmt: skip
                update += weight_of_products[:, None] * products
            d_factor = load_matrix(d_factor_ptr, offs_i, offs_r, I, R, stride_di, stride_dr)
            if HAS_KEPT:
                update += coefficient[:, None] * kept
            store_matrix(d_factor_ptr, d_factor + scaling * update, offs_i, offs_r, I, R, stride_di, stride_dr)


def norm_and_scale(
    W: Tensor,
    P: Tensor,
    Z: Tensor,
    magnitude: Tensor,
    coefficient: Tensor | None,
    norm: Tensor,
    scale: Tensor,
    kept: Tensor | None,
    cancelled: Tensor,
    *,
    scaling: float,
    eps: float,
    precision: str,
) -> Tensor:
    """Norms over j of V = W [I, J] + s·P [I, R]·Z [J, R]ᵀ weighted by the coefficient [J] (None: 1).

    Writes norm [I], scale = magnitude / norm [I] and, where asked for, V·(c⊙Z) to kept [I, R]. Returns scale² [I].
    Of ``cancelled`` [4] it writes the first without a coefficient, and the second with one, which then is that of the
    other axis.
    """
    first = coefficient is None  # of a layer's
    word, written = (None, cancelled) if first else (cancelled[:1], cancelled[1:2])
    return _finish_norm(
        W, P, Z, magnitude, coefficient, norm, scale, kept, word, written,
        scaling=scaling, eps=eps, precision=precision, clear=first,
    )  # fmt: skip


def weighted_sums(
    W: Tensor,
    P: Tensor,
    Z: Tensor,
    coefficient: Tensor | None,
    word: Tensor | None,
    *,
    scaling: float,
    signed: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """squares [I] and products [I, R], equations (b) and (a), where the norms need more than this W: a shard, say.

    ``word`` is what such calls before said of cancelled lines; the third tensor [4] says whether a line is cancelled
    here. ``signed`` is for coefficients of either sign, whose sums may cancel without the lines.
    """
    products = empty(P.shape, torch.float32, W.device)
    cancelled = empty((4,), torch.float32, W.device)
    squares = _finish_norm(
        W, P, Z, None, coefficient, None, None, products, word, cancelled,
        scaling=scaling, eps=0.0, precision=precision, clear=True, signed=signed,
    )  # fmt: skip
    return squares, products, cancelled


def _finish_norm(
    W, P, Z, magnitude, coefficient, norm, scale, kept, word, cancelled, *,
    scaling, eps, precision, clear, signed=False,
) -> Tensor:  # fmt: skip
    sums = sums_over(W, P, Z, coefficient, scaling, precision, cleared=cancelled if clear else None, out=kept)
    I, R = P.shape
    result = empty((I,), torch.float32, W.device)
    config = finish_config(target(W.get_device())[0], R, W.dtype) | overlapping(W.get_device())
    launch(
        _finish_norm_kernel,
        (cdiv(I, config["BLOCK_SIZE_I"]),),
        (sums.products, sums.squares, W, P, Z, coefficient, magnitude, norm, scale, result, kept, word, cancelled),
        splits=sums.splits, gram_parts=sums.gram_parts, groups=sums.groups, I=I, J=W.shape[1],
        stride_wi=W.stride(0), stride_wj=W.stride(1), stride_pi=P.stride(0), stride_pr=P.stride(1),
        stride_zj=Z.stride(0), stride_zr=Z.stride(1), scaling=scaling, eps=eps, APART=sums.groups > 0,
        R=R, HAS_COEFFICIENT=coefficient is not None, HAS_MAGNITUDE=magnitude is not None, HAS_KEPT=kept is not None,
        SIGNED=signed, FLAGS=0 if word is None else min(2, len(word)), PRECISION=precision, **config,
    )  # fmt: skip
    return result


class Axis(NamedTuple):
    """What the path through one axis's norms is made of; None for what is absent or not needed."""

    W: Tensor  # [I, J], this axis first
    P: Tensor  # [I, R]
    norm: Tensor | None  # [I]
    scale: Tensor | None  # [I]
    magnitude: Tensor | None  # [I]
    coefficient: Tensor | None  # [I]: −S / norm²
    kept: Tensor | None  # [I, R]: what ``norm`` left over
    d_magnitude: Tensor | None  # [I], added to
    d_factor: Tensor | None  # [I, R], added to


def add_norm_path(
    axis: Axis, other: Axis, word: Tensor, *, first: bool, scaling: float, eps: float, stand_in: float, precision: str
) -> None:
    """Adds the path through the norms to the axis's d_factor and, if it is the first, to its d_magnitude.

    First, equations (8) to (10): other.coefficient is κ (None for DoRA), and axis.coefficient becomes λ in place.
    Second, equation (11): other.coefficient is λ and axis.coefficient κ (None for DoRA).
    ``word`` is what the norms said of cancelled lines.
    """
    W, P, coefficient, d_factor = axis.W, axis.P, axis.coefficient, axis.d_factor
    (I, R), sums = P.shape, NO_SUMS
    if other.coefficient is not None:
        over_x = d_factor is not None
        sums = sums_over(W, P, other.P, other.coefficient, scaling, precision, squares_needed=first, in_place=over_x)
    strides = (0, 0) if d_factor is None else d_factor.stride()
    config = finish_config(target(W.get_device())[0], R, W.dtype) | overlapping(W.get_device())
    launch(
        _finish_path_kernel,
        (cdiv(I, config["BLOCK_SIZE_I"]),),
        (sums.products, sums.squares, W, P, other.P, other.coefficient, word, *axis[2:]),
        splits=sums.splits, gram_parts=sums.gram_parts, groups=sums.groups, I=I, J=W.shape[1],
        stride_wi=W.stride(0), stride_wj=W.stride(1), stride_pi=P.stride(0), stride_pr=P.stride(1),
        stride_zj=other.P.stride(0), stride_zr=other.P.stride(1), stride_di=strides[0], stride_dr=strides[1],
        scaling=scaling, eps=eps, stand_in=stand_in,
        R=R, FIRST=first, HAS_PRODUCTS=sums.products is not None, HAS_KEPT=coefficient is not None,
        HAS_FACTOR=d_factor is not None, APART=sums.groups > 0, PRECISION=precision, **config,
    )  # fmt: skip
