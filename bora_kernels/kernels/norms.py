"""Row and column norms of the adapted weight from one read of W0.

    V = W0 + s·P·Qᵀ  [F, S]                      "first" is the axis normalized first, see ``factored``
    (1) first_norm  = max(‖V‖ over S, eps)       first_scale  = m_first / first_norm
    (2) second_norm = max(‖first_scale⊙V‖ over F, eps)        second_scale = m_second / second_norm

A program owns a block of the first axis, gets its norms in one sweep over the second axis, and sweeps again (from
cache) for its part of the sums behind the second norms. A second, small kernel adds the parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import load_v_tile, load_vector
from .config import norm_config, rank_block


@triton.jit
def _first_norm_kernel(
    w_ptr,  # [F, S]
    p_ptr,  # [F, R]
    q_ptr,  # [S, R]
    magnitude_ptr,  # [F]
    norm_ptr,  # [F]
    scale_ptr,  # [F]
    parts_ptr,  # [cdiv(F, BLOCK_SIZE_F), S]
    F, S,
    stride_wf, stride_ws, stride_pf, stride_pr, stride_qs, stride_qr,
    scaling, eps,
    R: tl.constexpr,
    BLOCK_SIZE_F: tl.constexpr, BLOCK_SIZE_S: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_SECOND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_f = pid * BLOCK_SIZE_F + tl.arange(0, BLOCK_SIZE_F)
    mask_f = offs_f < F

    squares = tl.zeros((BLOCK_SIZE_F,), dtype=tl.float32)
    for s in range(0, S, BLOCK_SIZE_S):
        offs_s = s + tl.arange(0, BLOCK_SIZE_S)
        v = load_v_tile(
            w_ptr, p_ptr, q_ptr, offs_f, offs_s, F, S,
            stride_wf, stride_ws, stride_pf, stride_pr, stride_qs, stride_qr, scaling, R, BLOCK_SIZE_R, PRECISION,
        )  # fmt: skip
        squares += tl.sum(v * v, axis=1)
    norm = tl.maximum(tl.sqrt(squares), eps, propagate_nan=tl.PropagateNan.ALL)  # (1)
    scale = load_vector(magnitude_ptr, offs_f, F) / norm
    tl.store(norm_ptr + offs_f, norm, mask=mask_f)
    tl.store(scale_ptr + offs_f, scale, mask=mask_f)

    if HAS_SECOND:
        parts_ptr += pid.to(tl.int64) * S
        for s in range(0, S, BLOCK_SIZE_S):
            offs_s = s + tl.arange(0, BLOCK_SIZE_S)
            v = load_v_tile(
                w_ptr, p_ptr, q_ptr, offs_f, offs_s, F, S,
                stride_wf, stride_ws, stride_pf, stride_pr, stride_qs, stride_qr, scaling, R, BLOCK_SIZE_R, PRECISION,
            )  # fmt: skip
            h = tl.where(mask_f[:, None], v * scale[:, None], 0.0)
            tl.store(parts_ptr + offs_s, tl.sum(h * h, axis=0), mask=offs_s < S)


@triton.jit
def _second_norm_kernel(
    parts_ptr,  # [num_parts, S]
    magnitude_ptr,  # [S]
    norm_ptr,  # [S]
    scale_ptr,  # [S]
    num_parts, S,
    eps,
    BLOCK_SIZE_PARTS: tl.constexpr, BLOCK_SIZE_S: tl.constexpr,
):  # fmt: skip
    offs_s = tl.program_id(0) * BLOCK_SIZE_S + tl.arange(0, BLOCK_SIZE_S)
    mask_s = offs_s < S
    squares = tl.zeros((BLOCK_SIZE_PARTS, BLOCK_SIZE_S), dtype=tl.float32)
    for part in range(0, num_parts, BLOCK_SIZE_PARTS):
        offs_p = part + tl.arange(0, BLOCK_SIZE_PARTS)
        ptrs = parts_ptr + offs_p.to(tl.int64)[:, None] * S + offs_s[None, :]
        squares += tl.load(ptrs, mask=(offs_p < num_parts)[:, None] & mask_s[None, :], other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(squares, axis=0)), eps, propagate_nan=tl.PropagateNan.ALL)  # (2)
    tl.store(norm_ptr + offs_s, norm, mask=mask_s)
    tl.store(scale_ptr + offs_s, load_vector(magnitude_ptr, offs_s, S) / norm, mask=mask_s)


def norms(
    W: Tensor,
    P: Tensor,
    Q: Tensor,
    m_first: Tensor,
    m_second: Tensor | None,
    *,
    scaling: float,
    eps: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """first_norm, first_scale, second_norm, second_scale of W [F, S] + s·P [F, R]·Q [S, R]ᵀ, float32."""
    (F, S), R = W.shape, P.shape[1]
    config = norm_config(W.dtype, R)
    num_parts = triton.cdiv(F, config["BLOCK_SIZE_F"])
    vector = {"dtype": torch.float32, "device": W.device}
    first_norm, first_scale = torch.empty(F, **vector), torch.empty(F, **vector)
    parts = torch.empty((num_parts, S), **vector) if m_second is not None else first_norm
    _first_norm_kernel[(num_parts,)](
        w_ptr=W, p_ptr=P, q_ptr=Q, magnitude_ptr=m_first, norm_ptr=first_norm, scale_ptr=first_scale, parts_ptr=parts,
        F=F, S=S,
        stride_wf=W.stride(0), stride_ws=W.stride(1),
        stride_pf=P.stride(0), stride_pr=P.stride(1), stride_qs=Q.stride(0), stride_qr=Q.stride(1),
        scaling=scaling, eps=eps,
        R=R, BLOCK_SIZE_R=rank_block(R, W.dtype), HAS_SECOND=m_second is not None, PRECISION=precision, **config,
    )  # fmt: skip
    if m_second is None:
        return first_norm, first_scale, None, None
    second_norm, second_scale = torch.empty(S, **vector), torch.empty(S, **vector)
    block = 64
    _second_norm_kernel[(triton.cdiv(S, block),)](
        parts_ptr=parts, magnitude_ptr=m_second, norm_ptr=second_norm, scale_ptr=second_scale,
        num_parts=num_parts, S=S, eps=eps, BLOCK_SIZE_PARTS=32, BLOCK_SIZE_S=block, num_warps=4,
    )  # fmt: skip
    return first_norm, first_scale, second_norm, second_scale
