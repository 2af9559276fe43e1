"""The gate of an MLP, h = act(e)⊙f, and its backward. e and f are what gate and up give, without biases of their own.

``gate``            h = act(e)⊙f
``gate_backward``   de = dh⊙f⊙act'(e)        df = dh⊙act(e)
``gate_sums``       the same gradients, folded for the products that follow, and all sums over tokens that
                    gate, up and down need of e, f and dh, in one read of them:
                    de⊙a_e                   S_e = Σ_m de⊙e          deᵀ·u_e
                    df⊙a_f                   S_f = Σ_m df⊙f          dfᵀ·u_f
                    h, which is not stored   D_d = Σ_m dh⊙h          hᵀ·v_d
                    (5) and (6) of ``ops.torch_backend``, in parts that ``combine`` adds

act(e) = e·P(e), so act'(e) = P(e) + e·P'(e). P is the logistic function for SiLU and, of a polynomial in e, for the
approximation of GELU by tanh; for GELU it is the normal distribution.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Activation
from ..replay.recording import empty, launch
from .common import add_product, load_matrix, load_vector, round_with_dither
from .config import cdiv, gate_config, is_aligned, target
from .joint_config import gate_sums_config


@triton.jit
def _activated(e, ACTIVATION: tl.constexpr):
    """act(e) and act'(e) in float32."""
    if ACTIVATION == "silu":
        p = tl.sigmoid(e)
        slope = p * (1.0 - p)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh z) / 2 is the logistic function of 2z
        p = tl.sigmoid(1.5957691216057308 * e * (1.0 + 0.044715 * e * e))
        slope = p * (1.0 - p) * 1.5957691216057308 * (1.0 + 0.134145 * e * e)
    else:
        p = 0.5 * (1.0 + tl.erf(0.7071067811865476 * e))
        slope = 0.3989422804014327 * tl.exp(-0.5 * e * e)
    return e * p, p + e * slope


@triton.jit
def _gate_kernel(
    e_ptr,  # [n]
    f_ptr,  # [n]
    h_ptr,  # [n]
    n,
    BLOCK_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    activated, _ = _activated(load_vector(e_ptr, offs, n), ACTIVATION)
    h = activated * load_vector(f_ptr, offs, n)
    tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _gate_backward_kernel(
    e_ptr,  # [n]
    f_ptr,  # [n]
    dh_ptr,  # [n], read and then written over: dh, de
    df_ptr,  # [n]
    n,
    BLOCK_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    activated, slope = _activated(load_vector(e_ptr, offs, n), ACTIVATION)
    dh = load_vector(dh_ptr, offs, n)
    de = dh * load_vector(f_ptr, offs, n) * slope
    tl.store(dh_ptr + offs, de.to(dh_ptr.dtype.element_ty), mask=offs < n)
    tl.store(df_ptr + offs, (dh * activated).to(df_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _gate_sums_kernel(
    e_ptr,  # [M, C], contiguous, as are f, dh and df
    f_ptr,  # [M, C]
    dh_ptr,  # [M, C], read and then written over: dh, de⊙scale_e
    df_ptr,  # [M, C]: df⊙scale_f
    scale_e_ptr,  # [C]
    scale_f_ptr,  # [C]
    projection_e_ptr,  # [M, R_E], contiguous; so are those of f and h
    projection_f_ptr,  # [M, R_F]
    projection_h_ptr,  # [M, R_H]
    factor_e_ptr,  # [splits, C, R_E]
    factor_f_ptr,  # [splits, C, R_F]
    factor_h_ptr,  # [splits, C, R_H]
    total_e_ptr,  # [splits, C]
    total_f_ptr,  # [splits, C]
    total_h_ptr,  # [splits, C]
    M, C, split_size,
    R_E: tl.constexpr, R_F: tl.constexpr, R_H: tl.constexpr,  # 0 where there is no product
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_SCALE_E: tl.constexpr, HAS_SCALE_F: tl.constexpr,
    HAS_TOTAL_E: tl.constexpr, HAS_TOTAL_F: tl.constexpr, HAS_TOTAL_H: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = e_ptr.dtype.element_ty
    offs_c = tl.program_id(0) * BLOCK_SIZE_C + tl.arange(0, BLOCK_SIZE_C)
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * split_size, M)
    factor_e = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), dtype=tl.float32)
    factor_f = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), dtype=tl.float32)
    factor_h = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), dtype=tl.float32)
    total_e = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_C), dtype=tl.float32)  # summed over tokens once, after the loop
    total_f = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_C), dtype=tl.float32)
    total_h = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_C), dtype=tl.float32)
    for m in range(split * split_size, end, BLOCK_SIZE_M):
        offs_m = m + tl.arange(0, BLOCK_SIZE_M)
        e = load_matrix(e_ptr, offs_m, offs_c, end, C, C, 1).to(tl.float32)  # [BLOCK_SIZE_M, BLOCK_SIZE_C]
        f = load_matrix(f_ptr, offs_m, offs_c, end, C, C, 1).to(tl.float32)
        dh = load_matrix(dh_ptr, offs_m, offs_c, end, C, C, 1).to(tl.float32)
        activated, slope = _activated(e, ACTIVATION)
        de, df = dh * f * slope, dh * activated
        _store_folded(dh_ptr, de, scale_e_ptr, offs_m, offs_c, end, C, HAS_SCALE_E, dtype)
        _store_folded(df_ptr, df, scale_f_ptr, offs_m, offs_c, end, C, HAS_SCALE_F, dtype)
        if HAS_TOTAL_E:
            total_e += de * e
        if HAS_TOTAL_F:
            total_f += df * f
        factor_e = add_product(factor_e, de.to(dtype), projection_e_ptr, offs_m, end, R_E, PRECISION)
        factor_f = add_product(factor_f, df.to(dtype), projection_f_ptr, offs_m, end, R_F, PRECISION)
        if HAS_TOTAL_H or R_H > 0:
            h = (activated * f).to(dtype)
            if HAS_TOTAL_H:
                total_h += dh * h.to(tl.float32)
            factor_h = add_product(factor_h, h, projection_h_ptr, offs_m, end, R_H, PRECISION)
    base = split.to(tl.int64) * C + offs_c
    _store_sums(factor_e_ptr, total_e_ptr, factor_e, total_e, base, offs_c, C, R_E, HAS_TOTAL_E)
    _store_sums(factor_f_ptr, total_f_ptr, factor_f, total_f, base, offs_c, C, R_F, HAS_TOTAL_F)
    _store_sums(factor_h_ptr, total_h_ptr, factor_h, total_h, base, offs_c, C, R_H, HAS_TOTAL_H)


@triton.jit
def _store_folded(
    ptr, t, scale_ptr, offs_m, offs_c, end, C, HAS_SCALE: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    ptrs = ptr + offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    mask = (offs_m < end)[:, None] & (offs_c < C)[None, :]
    if HAS_SCALE:
        scaled = t * load_vector(scale_ptr, offs_c, C)[None, :]
        tl.store(ptrs, round_with_dither(scaled, offs_m, offs_c, dtype), mask=mask)
    else:
        tl.store(ptrs, t.to(dtype), mask=mask)


@triton.jit
def _store_sums(
    factor_ptr, total_ptr, factor, total, base, offs_c, C, R: tl.constexpr, HAS_TOTAL: tl.constexpr
):  # fmt: skip
    if HAS_TOTAL:
        tl.store(total_ptr + base, tl.sum(total, axis=0), mask=offs_c < C)
    if R > 0:
        offs_r = tl.arange(0, factor.shape[1])
        mask = (offs_c < C)[:, None] & (offs_r < R)[None, :]
        tl.store(factor_ptr + base[:, None] * R + offs_r[None, :], factor, mask=mask)


class Side(NamedTuple):
    """What ``gate_sums`` makes for one of the three layers."""

    scale: Tensor | None  # [C], folded into the gradient; that of h is not stored
    projection: Tensor | None  # [M, R], for the factor's gradient
    total: bool  # whether S or D is needed


def gate(e: Tensor, f: Tensor, activation: Activation) -> Tensor:
    """h in e's dtype; e and f are contiguous, of any shape."""
    h = empty(e.shape, e.dtype, e.device)
    config = gate_config()
    launch(
        _gate_kernel, (cdiv(e.numel(), config["BLOCK_SIZE"]),), (e, f, h), n=e.numel(), ACTIVATION=activation, **config
    )
    return h


def gate_backward(e: Tensor, f: Tensor, dh: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """de, written over dh, and df in e's dtype; all are contiguous and of one shape."""
    df = empty(e.shape, e.dtype, e.device)
    config = gate_config()
    launch(
        _gate_backward_kernel,
        (cdiv(e.numel(), config["BLOCK_SIZE"]),),
        (e, f, dh, df),
        n=e.numel(), ACTIVATION=activation, **config,
    )  # fmt: skip
    return dh, df


def gate_sums(
    e: Tensor, f: Tensor, dh: Tensor, sides: tuple[Side, Side, Side], activation: Activation, *, precision: str
) -> tuple[Tensor, Tensor, list[tuple[Tensor | None, Tensor | None]]]:
    """de⊙scale_e, written over dh, and df⊙scale_f [M, C], rounded with dither, and the sums of gate, up and down.

    The sums are parts of tᵀ·projection [splits, C, R] and of Σ_m t⊙other [splits, C], as ``low_rank.reduce`` has them.
    """
    M, C = e.shape
    arch, processors = target(e.get_device())
    ranks = [0 if side.projection is None else side.projection.shape[1] for side in sides]
    splits, config = gate_sums_config(arch, processors, M, C, max(1, *ranks), e.dtype, is_aligned(e))
    df = empty((M, C), e.dtype, e.device)
    factors = [None if R == 0 else empty((splits, C, R), torch.float32, e.device) for R in ranks]
    totals = [empty((splits, C), torch.float32, e.device) if side.total else None for side in sides]
    block_m = config["BLOCK_SIZE_M"]
    launch(
        _gate_sums_kernel,
        (cdiv(C, config["BLOCK_SIZE_C"]), splits),
        (e, f, dh, df, sides[0].scale, sides[1].scale, *[side.projection for side in sides], *factors, *totals),
        M=M, C=C, split_size=cdiv(cdiv(M, splits), block_m) * block_m,
        R_E=ranks[0], R_F=ranks[1], R_H=ranks[2],
        HAS_SCALE_E=sides[0].scale is not None, HAS_SCALE_F=sides[1].scale is not None,
        HAS_TOTAL_E=sides[0].total, HAS_TOTAL_F=sides[1].total, HAS_TOTAL_H=sides[2].total,
        ACTIVATION=activation, PRECISION=precision, **config,
    )  # fmt: skip
    return dh, df, list(zip(factors, totals, strict=True))
