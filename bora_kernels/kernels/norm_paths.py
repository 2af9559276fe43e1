"""The exact gradient's paths through the norms, from two reads of W0.

    (8)  κ = −S_second / second_norm²         w = V²·κ           S'_first = S_first + first_scale²⊙w
    (9)  λ = −S'_first / first_norm²          dm_first = S'_first / m_first
    (10) dP += s·[ first_scale²⊙(V·(κ⊙Q)) + λ⊙(V·Q) ]
    (11) dQ += s·[ κ⊙(Vᵀ·(first_scale²⊙P)) + Vᵀ·(λ⊙P) ]

The first kernel owns rows of V and does (8), (9), (10); the second owns columns, for a split of the rows, and does
(11). A norm that was clamped passes no gradient. Numbers are those of ``factored``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import load_matrix, load_v_tile, load_vector
from .config import TRITON_DTYPES, first_path_config, rank_block, second_path_config
from .low_rank import combine, live_magnitude


@triton.jit
def _coefficient(total_ptr, norm_ptr, scale_ptr, offs, size, eps):
    """−S / norm², 0 where the norm was clamped or the magnitude (and with it the true S) is zero."""
    norm = load_vector(norm_ptr, offs, size)
    live = (norm > eps) & (load_vector(scale_ptr, offs, size) != 0.0)
    return tl.where(live, -load_vector(total_ptr, offs, size) / (norm * norm), 0.0)


@triton.jit
def _first_path_kernel(
    w_ptr,  # [F, S]
    p_ptr,  # [F, R]
    q_ptr,  # [S, R]
    first_norm_ptr,  # [F]
    first_scale_ptr,  # [F]
    first_total_ptr,  # [F]
    magnitude_ptr,  # [F]
    second_norm_ptr,  # [S]
    second_scale_ptr,  # [S]
    second_total_ptr,  # [S]
    lambda_ptr,  # [F]
    d_magnitude_ptr,  # [F], added to
    d_p_ptr,  # [F, R], added to
    F, S,
    stride_wf, stride_ws, stride_pf, stride_pr, stride_qs, stride_qr, stride_df, stride_dr,
    scaling, eps, stand_in,
    R: tl.constexpr,
    BLOCK_SIZE_F: tl.constexpr, BLOCK_SIZE_S: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_SECOND: tl.constexpr, HAS_FACTOR: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_f = tl.program_id(0) * BLOCK_SIZE_F + tl.arange(0, BLOCK_SIZE_F)
    pid_r = tl.program_id(1)
    offs_r = pid_r * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)
    mask_f = offs_f < F

    w = tl.zeros((BLOCK_SIZE_F,), dtype=tl.float32)
    v_kq = tl.zeros((BLOCK_SIZE_F, BLOCK_SIZE_R), dtype=tl.float32)
    v_q = tl.zeros((BLOCK_SIZE_F, BLOCK_SIZE_R), dtype=tl.float32)
    for s in range(0, S, BLOCK_SIZE_S):
        offs_s = s + tl.arange(0, BLOCK_SIZE_S)
        v = load_v_tile(
            w_ptr, p_ptr, q_ptr, offs_f, offs_s, F, S,
            stride_wf, stride_ws, stride_pf, stride_pr, stride_qs, stride_qr, scaling, R, BLOCK_SIZE_R, PRECISION,
        )  # fmt: skip
        if HAS_SECOND:
            kappa = _coefficient(second_total_ptr, second_norm_ptr, second_scale_ptr, offs_s, S, eps)  # (8)
            w += tl.sum(v * v * kappa[None, :], axis=1)
        if HAS_FACTOR:
            q = load_matrix(q_ptr, offs_s, offs_r, S, R, stride_qs, stride_qr).to(tl.float32)
            v_q = tl.dot(v.to(DTYPE), q.to(DTYPE), v_q, input_precision=PRECISION)
            if HAS_SECOND:
                v_kq = tl.dot(v.to(DTYPE), (kappa[:, None] * q).to(DTYPE), v_kq, input_precision=PRECISION)

    scale = load_vector(first_scale_ptr, offs_f, F)
    norm = load_vector(first_norm_ptr, offs_f, F)
    path = scale * scale * w
    lam = _coefficient(first_total_ptr, first_norm_ptr, first_scale_ptr, offs_f, F, eps)
    lam -= tl.where(norm > eps, path / (norm * norm), 0.0)  # (9)
    if HAS_FACTOR:
        update = lam[:, None] * v_q + (scale * scale)[:, None] * v_kq  # (10)
        ptrs = d_p_ptr + offs_f.to(tl.int64)[:, None] * stride_df + offs_r.to(tl.int64)[None, :] * stride_dr
        mask = mask_f[:, None] & (offs_r < R)[None, :]
        tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + scaling * update, mask=mask)
    mask = mask_f & (pid_r == 0)
    tl.store(lambda_ptr + offs_f, lam, mask=mask)
    if HAS_SECOND:
        live = live_magnitude(first_scale_ptr, first_norm_ptr, magnitude_ptr, offs_f, F, stand_in)
        d_magnitude = tl.load(d_magnitude_ptr + offs_f, mask=mask, other=0.0)
        tl.store(d_magnitude_ptr + offs_f, d_magnitude + path / live, mask=mask)  # (9)


@triton.jit
def _second_path_kernel(
    w_ptr,  # [F, S]
    p_ptr,  # [F, R]
    q_ptr,  # [S, R]
    lambda_ptr,  # [F]
    first_scale_ptr,  # [F]
    second_norm_ptr,  # [S]
    second_scale_ptr,  # [S]
    second_total_ptr,  # [S]
    parts_ptr,  # [splits, S, R]
    F, S, split_size,
    stride_wf, stride_ws, stride_pf, stride_pr, stride_qs, stride_qr,
    scaling, eps,
    R: tl.constexpr,
    BLOCK_SIZE_F: tl.constexpr, BLOCK_SIZE_S: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_SECOND: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_s = tl.program_id(0) * BLOCK_SIZE_S + tl.arange(0, BLOCK_SIZE_S)
    split = tl.program_id(1)
    offs_r = tl.program_id(2) * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R)

    v_ap = tl.zeros((BLOCK_SIZE_S, BLOCK_SIZE_R), dtype=tl.float32)
    v_lp = tl.zeros((BLOCK_SIZE_S, BLOCK_SIZE_R), dtype=tl.float32)
    end = tl.minimum((split + 1) * split_size, F)
    for f in range(split * split_size, end, BLOCK_SIZE_F):
        offs_f = f + tl.arange(0, BLOCK_SIZE_F)
        v = load_v_tile(
            w_ptr, p_ptr, q_ptr, offs_f, offs_s, end, S,
            stride_wf, stride_ws, stride_pf, stride_pr, stride_qs, stride_qr, scaling, R, BLOCK_SIZE_R, PRECISION,
        )  # fmt: skip
        v_t = tl.trans(v.to(DTYPE))
        p = load_matrix(p_ptr, offs_f, offs_r, end, R, stride_pf, stride_pr).to(tl.float32)
        lam = load_vector(lambda_ptr, offs_f, end)
        v_lp = tl.dot(v_t, (lam[:, None] * p).to(DTYPE), v_lp, input_precision=PRECISION)
        if HAS_SECOND:
            scale = load_vector(first_scale_ptr, offs_f, end)
            v_ap = tl.dot(v_t, ((scale * scale)[:, None] * p).to(DTYPE), v_ap, input_precision=PRECISION)

    if HAS_SECOND:
        kappa = _coefficient(second_total_ptr, second_norm_ptr, second_scale_ptr, offs_s, S, eps)
        v_lp += kappa[:, None] * v_ap  # (11)
    rows = split.to(tl.int64) * S + offs_s
    mask = (offs_s < S)[:, None] & (offs_r < R)[None, :]
    tl.store(parts_ptr + rows[:, None] * R + offs_r[None, :], scaling * v_lp, mask=mask)


def norm_paths(
    W: Tensor,
    P: Tensor,
    Q: Tensor,
    m_first: Tensor,
    first_norm: Tensor,
    first_scale: Tensor,
    first_total: Tensor,
    second_norm: Tensor | None,
    second_scale: Tensor | None,
    second_total: Tensor | None,
    d_m_first: Tensor,
    dP: Tensor | None,
    dQ: Tensor | None,
    *,
    scaling: float,
    eps: float,
    stand_in: float,
    precision: str,
) -> None:
    """Adds equations (8) to (11) to d_m_first [F], dP [F, R] and dQ [S, R] (float32, any strides; None if not needed)."""
    (F, S), R = W.shape, P.shape[1]
    has_second = second_norm is not None
    strides = {
        "stride_wf": W.stride(0), "stride_ws": W.stride(1),
        "stride_pf": P.stride(0), "stride_pr": P.stride(1), "stride_qs": Q.stride(0), "stride_qr": Q.stride(1),
    }  # fmt: skip
    operand = TRITON_DTYPES[torch.bfloat16 if W.dtype == torch.bfloat16 else torch.float32]
    shared = {
        "R": R, "BLOCK_SIZE_R": rank_block(R, W.dtype), "HAS_SECOND": has_second, "DTYPE": operand, "PRECISION": precision
    }  # fmt: skip
    lam = torch.empty_like(first_norm)
    config = first_path_config(W.dtype, R)
    stride_df, stride_dr = (0, 0) if dP is None else dP.stride()
    grid = (triton.cdiv(F, config["BLOCK_SIZE_F"]), 1 if dP is None else triton.cdiv(R, rank_block(R, W.dtype)))
    _first_path_kernel[grid](
        w_ptr=W, p_ptr=P, q_ptr=Q,
        first_norm_ptr=first_norm, first_scale_ptr=first_scale, first_total_ptr=first_total, magnitude_ptr=m_first,
        second_norm_ptr=second_norm, second_scale_ptr=second_scale, second_total_ptr=second_total,
        lambda_ptr=lam, d_magnitude_ptr=d_m_first, d_p_ptr=dP,
        F=F, S=S, **strides, stride_df=stride_df, stride_dr=stride_dr,
        scaling=scaling, eps=eps, stand_in=stand_in,
        HAS_FACTOR=dP is not None, **shared, **config,
    )  # fmt: skip
    if dQ is None:
        return
    splits, config = second_path_config(F, S, R, W.dtype)
    split_size = triton.cdiv(triton.cdiv(F, splits), config["BLOCK_SIZE_F"]) * config["BLOCK_SIZE_F"]
    parts = torch.empty((splits, S, R), dtype=torch.float32, device=W.device)
    grid = (triton.cdiv(S, config["BLOCK_SIZE_S"]), splits, triton.cdiv(R, rank_block(R, W.dtype)))
    _second_path_kernel[grid](
        w_ptr=W, p_ptr=P, q_ptr=Q, lambda_ptr=lam, first_scale_ptr=first_scale,
        second_norm_ptr=second_norm, second_scale_ptr=second_scale, second_total_ptr=second_total, parts_ptr=parts,
        F=F, S=S, split_size=split_size, **strides,
        scaling=scaling, eps=eps,
        **shared, **config,
    )  # fmt: skip
    combine(parts, None, None, None, None, dQ, accumulate=True)
