"""The weight that an adapted convolution is given: W0, or V itself where the update cancels channels.

    V = W0 + s·B·A        p⊙V⊙q, rounded once, with dither

Which of the two it is, what the norms say of cancelled lines decides on the device: the host knows nothing of it and
waits for nothing. Where no line is cancelled a program copies, which reads and writes W0 once.

The factors p and q are powers of two of output and input channels, by which float16's range holds what is left of V.
A weight [N, I, J] has the axes of a row, input channels and taps, in the order that they have in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from ..replay.stage import stage
from .common import any_set, load_matrix, load_vector, round_with_dither
from .config import TRITON_DTYPES, cdiv, weight_or_v_config


@triton.jit
def _weight_or_v_kernel(
    w_ptr,  # [N, I, J]
    a_ptr,  # [R, I, J]
    b_ptr,  # [N, R]
    word_ptr,  # [2]: not 0 where lines are cancelled
    p_ptr,  # [N]
    q_ptr,  # [I] or [J]: the axis whose stride is 1
    out_ptr,  # [N, I, J], contiguous
    N, I, J,
    stride_wn, stride_wi, stride_wj, stride_ar, stride_ai, stride_aj, stride_bn, stride_br, stride_qi, stride_qj,
    scaling,
    R: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
    HAS_P: tl.constexpr, HAS_Q: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    C = I * J
    blocks_c = tl.cdiv(C, BLOCK_SIZE_C)
    offs_n = tl.program_id(0) // blocks_c * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    offs_c = tl.program_id(0) % blocks_c * BLOCK_SIZE_C + tl.arange(0, BLOCK_SIZE_C)
    offs_i, offs_j = (offs_c // J).to(tl.int64), (offs_c % J).to(tl.int64)
    mask = (offs_n < N)[:, None] & (offs_c < C)[None, :]
    rows = offs_n.to(tl.int64)[:, None]
    w = tl.load(w_ptr + rows * stride_wn + (offs_i * stride_wi + offs_j * stride_wj)[None, :], mask=mask, other=0.0)
    out = w.to(DTYPE)
    if any_set(word_ptr, 2):
        update = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_C), dtype=tl.float32)
        for r in tl.range(0, R, BLOCK_SIZE_R):
            offs_r = r + tl.arange(0, BLOCK_SIZE_R)
            b = load_matrix(b_ptr, offs_n, offs_r, N, R, stride_bn, stride_br).to(tl.float32)
            ptrs = a_ptr + offs_r.to(tl.int64)[:, None] * stride_ar + (offs_i * stride_ai + offs_j * stride_aj)[None, :]
            a = tl.load(ptrs, mask=(offs_r < R)[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)
            update = tl.dot(b, a, update, input_precision="ieee")
        v = w.to(tl.float32) + scaling * update
        if HAS_P:
            v *= load_vector(p_ptr, offs_n, N)[:, None]
        if HAS_Q:
            v *= tl.load(q_ptr + offs_i * stride_qi + offs_j * stride_qj, mask=offs_c < C, other=0.0)[None, :]
        out = round_with_dither(v, offs_n, offs_c, DTYPE)
    tl.store(out_ptr + rows * C + offs_c[None, :], out, mask=mask)


@stage
def weight_or_v(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    word: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    *,
    scaling: float,
    channels_last: bool,
    dtype: torch.dtype,
) -> tuple[Tensor]:
    """W [N, I, J] in ``dtype``, contiguous; p⊙(W + scaling·B·A)⊙q where there is ``word`` [2].

    A is [R, I, J], B [N, R], p [N] or None, and q None or [K], K being J for ``channels_last`` and I otherwise.
    """
    (N, I, J), R = W.shape, A.shape[0]
    out = empty((N, I, J), dtype, W.device)
    config = weight_or_v_config()
    launch(
        _weight_or_v_kernel,
        (cdiv(N, config["BLOCK_SIZE_N"]) * cdiv(I * J, config["BLOCK_SIZE_C"]),),
        (W, A, B, word, p, q, out),
        N=N, I=I, J=J,
        stride_wn=W.stride(0), stride_wi=W.stride(1), stride_wj=W.stride(2),
        stride_ar=A.stride(0), stride_ai=A.stride(1), stride_aj=A.stride(2),
        stride_bn=B.stride(0), stride_br=B.stride(1), stride_qi=int(not channels_last), stride_qj=int(channels_last),
        scaling=scaling, R=R, HAS_P=p is not None, HAS_Q=q is not None, DTYPE=TRITON_DTYPES[dtype], **config,
    )  # fmt: skip
    return (out,)
