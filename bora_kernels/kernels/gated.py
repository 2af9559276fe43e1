"""The gate of an MLP, h = act(e)⊙f, and its backward. e and f are what gate and up give, without biases of their own.

``gate``            h = act(e)⊙f
``gate_backward``   de = dh⊙f⊙act'(e)        df = dh⊙act(e)

act(e) = e·P(e), so act'(e) = P(e) + e·P'(e). P is the logistic function for SiLU and, of a polynomial in e, for the
approximation of GELU by tanh; for GELU it is the normal distribution.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..contract import Activation
from ..replay.recording import empty, launch
from .common import load_vector
from .config import cdiv, gate_config


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
    dh_ptr,  # [n]
    de_ptr,  # [n]
    df_ptr,  # [n]
    n,
    BLOCK_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    activated, slope = _activated(load_vector(e_ptr, offs, n), ACTIVATION)
    dh = load_vector(dh_ptr, offs, n)
    de = dh * load_vector(f_ptr, offs, n) * slope
    tl.store(de_ptr + offs, de.to(de_ptr.dtype.element_ty), mask=offs < n)
    tl.store(df_ptr + offs, (dh * activated).to(df_ptr.dtype.element_ty), mask=offs < n)


def gate(e: Tensor, f: Tensor, activation: Activation) -> Tensor:
    """h in e's dtype; e and f are contiguous, of any shape."""
    h = empty(e.shape, e.dtype, e.device)
    config = gate_config()
    launch(
        _gate_kernel, (cdiv(e.numel(), config["BLOCK_SIZE"]),), (e, f, h), n=e.numel(), ACTIVATION=activation, **config
    )
    return h


def gate_backward(e: Tensor, f: Tensor, dh: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """de and df in e's dtype; all are contiguous and of one shape."""
    de, df = empty(e.shape, e.dtype, e.device), empty(e.shape, e.dtype, e.device)
    config = gate_config()
    launch(
        _gate_backward_kernel,
        (cdiv(e.numel(), config["BLOCK_SIZE"]),),
        (e, f, dh, de, df),
        n=e.numel(), ACTIVATION=activation, **config,
    )  # fmt: skip
    return de, df
