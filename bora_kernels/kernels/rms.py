"""RMSNorm by rows, with a frozen weight w and c = offset + w: one pass each way.

``rms_norm``            y = n⊙c        n = x·r        r = 1/√(mean x² + eps)
``rms_norm_backward``   dx = r·(t − n·mean(t⊙n))      t = dy⊙c

A tile holds whole rows, so that r is made where x is at hand and nothing but x is kept.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from .common import load_matrix, load_vector
from .config import cdiv, rms_norm_config


@triton.jit
def _load_normalized(x_ptr, offs_m, offs_k, M, K, eps):
    """n [BLOCK_SIZE_M, BLOCK_SIZE_K] and r [BLOCK_SIZE_M, 1] in float32."""
    x = load_matrix(x_ptr, offs_m, offs_k, M, K, K, 1).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)[:, None]
    return x * r, r


@triton.jit
def _store_rows(ptr, value, offs_m, offs_k, M, K):
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    tl.store(ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [M, K], contiguous
    weight_ptr,  # [K]
    y_ptr,  # [M, K], contiguous
    M, K,
    offset, eps,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    offs_k = tl.arange(0, BLOCK_SIZE_K)
    n, _ = _load_normalized(x_ptr, offs_m, offs_k, M, K, eps)
    c = offset + load_vector(weight_ptr, offs_k, K)
    _store_rows(y_ptr, n * c[None, :], offs_m, offs_k, M, K)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr,  # [M, K], contiguous
    x_ptr,  # [M, K], contiguous
    weight_ptr,  # [K]
    dx_ptr,  # [M, K], contiguous
    M, K,
    offset, eps,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    offs_k = tl.arange(0, BLOCK_SIZE_K)
    n, r = _load_normalized(x_ptr, offs_m, offs_k, M, K, eps)
    c = offset + load_vector(weight_ptr, offs_k, K)
    t = load_matrix(dy_ptr, offs_m, offs_k, M, K, K, 1).to(tl.float32) * c[None, :]
    mean = tl.sum(t * n, axis=1) / K
    _store_rows(dx_ptr, r * (t - n * mean[:, None]), offs_m, offs_k, M, K)


def rms_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """y in x's dtype; x is contiguous, with up to ``config.RMS_NORM_COLUMNS`` columns."""
    (M, K), config = x.shape, rms_norm_config(x.shape[1])
    y = empty((M, K), x.dtype, x.device)
    launch(
        _rms_norm_kernel, (cdiv(M, config["BLOCK_SIZE_M"]),), (x, weight, y),
        M=M, K=K, offset=offset, eps=eps, **config,
    )  # fmt: skip
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """dx in dy's dtype; dy and x are contiguous."""
    (M, K), config = x.shape, rms_norm_config(x.shape[1])
    dx = empty((M, K), dy.dtype, dy.device)
    launch(
        _rms_norm_backward_kernel, (cdiv(M, config["BLOCK_SIZE_M"]),), (dy, x, weight, dx),
        M=M, K=K, offset=offset, eps=eps, **config,
    )  # fmt: skip
    return dx
