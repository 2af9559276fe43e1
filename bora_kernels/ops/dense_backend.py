"""The layer over a weight with a short axis: the dense formula in float32, for the backends "triton" and "torch".

Where N or K is small (``contract.SHORT_AXIS``), W' and its gradient are small too, and update and base can cancel in a
whole row or column. Sums over squares of W0, and products that meet W0 and B·A apart, then lose what is left, so that V
is formed and everything is taken from it. With U = V / first_norm and Y = (first_scale⊙V) / second_norm, and the axes
named as in ``torch_backend``:

    y = x·W'ᵀ + bias            dx = dy·W'            G = dyᵀ·x  [N, K]
    dm_second = Σ_first Y⊙G                           dH = second_scale⊙(G − Y⊙dm_second)
    dm_first  = Σ_second U⊙dH                         dV = first_scale⊙(dH − U⊙dm_first)
    dA = s·Bᵀ·dV                dB = s·dV·Aᵀ

Detached norms leave out what is subtracted. With dropout x·W'ᵀ and G are those of two terms, W0's and that of s·B·A,
whose input is drop(x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Adapter, Needs, Options, Scales, accumulation_dtype, flatten_scales, given, split_scales
from .torch_backend import split_matmul, wide_matmul


def forward(
    x: Tensor,
    weight: Tensor,
    adapter: Adapter,
    flat_scales: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    options: Options,
    *,
    products: bool,
    save_product: bool,
    prepared: object = None,
) -> tuple[Tensor, None, Tensor, Tensor | None]:
    """The output [M, N], and the scales if they are made here; a backward takes all else from x and the parameters."""
    made, R = None, adapter.lora_A.shape[0]
    base, update = _terms(weight, adapter, options)
    if flat_scales is None and any(adapter.members):
        flat_scales = made = flatten_scales(_scales(base + update, adapter, options), weight.shape, R)
    scales = split_scales(flat_scales, weight.shape, R, adapter.members)
    if mask is None:
        y = split_matmul(x, _scaled(base + update, scales).T)
    else:
        y = split_matmul(x, _scaled(base, scales).T)
        y += _kept(split_matmul(torch.where(mask, x, 0), _scaled(update, scales).T), options)
    if bias is not None:
        y += bias
    return y.to(x.dtype), None, x.new_empty(0), made


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    adapter: Adapter,
    flat_scales: Tensor | None,
    product: None,
    u: Tensor | None,
    mask: Tensor | None,
    options: Options,
    needs: Needs,
    *,
    prepared: object = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, lora_A, lora_B, magnitude_row and magnitude_col; those of the parameters are wide."""
    scales = split_scales(flat_scales, weight.shape, adapter.lora_A.shape[0], adapter.members)
    base, update = _terms(weight, adapter, options)
    dx = dA = dB = dm_row = dm_col = None
    if needs.x:
        if mask is None:
            dx = split_matmul(dy, _scaled(base + update, scales))
        else:
            dx = split_matmul(dy, _scaled(base, scales))
            dx += torch.where(mask, _kept(split_matmul(dy, _scaled(update, scales)), options), 0)
        dx = dx.to(dy.dtype)
    if any(needs[1:]):
        x = given(x)
        G = wide_matmul(dy.T, x).to(base.dtype)
        apart = None
        if mask is not None:
            base_G, G = G, _kept(wide_matmul(dy.T, torch.where(mask, x, 0)).to(base.dtype), options)
            apart = base * (base_G - G)
        dV, dm_row, dm_col = _through_norms(base + update, G, apart, scales, options)
        lora_A, lora_B = adapter.lora_A.to(dV.dtype), adapter.lora_B.to(dV.dtype)
        dA = options.scaling * (lora_B.T @ dV) if needs.lora_A else None
        dB = options.scaling * (dV @ lora_A.T) if needs.lora_B else None
    return dx, dA, dB, dm_row if needs.magnitude_row else None, dm_col if needs.magnitude_col else None


def _scales(V: Tensor, adapter: Adapter, options: Options) -> Scales:
    """Norms and scales of this V to the bit: what its rounding leaves of a norm over one element cancels."""
    norms, H = {}, V
    for axis in options.norm_order.split("_"):
        magnitude = getattr(adapter, f"magnitude_{axis}")
        if magnitude is not None:
            dim = 1 if axis == "row" else 0
            norm = torch.linalg.vector_norm(H, dim=dim).clamp_min(options.eps)
            norms[f"{axis}_norm"], norms[f"{axis}_scale"] = norm, magnitude.to(norm.dtype) / norm
            H = H * norms[f"{axis}_scale"].unsqueeze(dim)
    return Scales(**norms)


def _through_norms(
    V: Tensor, G: Tensor, apart: Tensor | None, scales: Scales, options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dV [N, K], dm_r and dm_c from V and the gradient G of W'.

    With dropout G is that of s·B·A, and ``apart`` is W0 times what the gradient of W0's term has beyond it.
    """
    rows_first = scales.members.rows_first(options.norm_order)
    if not rows_first:
        V, G, apart = V.T, G.T, None if apart is None else apart.T
    row, col = (scales.row_norm, scales.row_scale), (scales.col_norm, scales.col_scale)
    (first_norm, first_scale), (second_norm, second_scale) = (row, col) if rows_first else (col, row)
    exact, eps = not options.detach_norm, options.eps
    dm_first = dm_second = None
    dH = full_dH = G
    if second_norm is not None:
        first_scale, second_scale = given(first_scale), given(second_scale)
        Y = V * first_scale[:, None] / second_norm
        dm_second = Y * G if apart is None else Y * G + apart * (first_scale[:, None] / second_norm)
        dm_second = dm_second.sum(0)
        dH = full_dH = G * second_scale
        if exact:
            full_dH = second_scale * (G - Y * torch.where(second_norm > eps, dm_second, 0))
    if first_norm is not None:
        U, scale = V / first_norm[:, None], given(first_scale)[:, None]
        dm_first = U * full_dH
        if apart is not None:
            dm_first += apart / first_norm[:, None] * (1 if second_scale is None else second_scale)
        dm_first = dm_first.sum(1)
        dV = scale * (full_dH - U * torch.where(first_norm > eps, dm_first, 0)[:, None]) if exact else scale * dH
    else:
        dV = G
    return (dV, dm_first, dm_second) if rows_first else (dV.T, dm_second, dm_first)


def _terms(weight: Tensor, adapter: Adapter, options: Options) -> tuple[Tensor, Tensor]:
    """W0 and s·B·A [N, K], wide."""
    dtype = accumulation_dtype(weight.dtype)
    return weight.to(dtype), options.scaling * (adapter.lora_B.to(dtype) @ adapter.lora_A.to(dtype))


def _scaled(matrix: Tensor, scales: Scales) -> Tensor:
    """a⊙matrix⊙g."""
    if scales.row_scale is not None:
        matrix = matrix * scales.row_scale[:, None]
    return matrix if scales.col_scale is None else matrix * scales.col_scale


def _kept(t: Tensor, options: Options) -> Tensor:
    """What dropout kept counts for all of it."""
    return t / (1.0 - options.dropout_p)
