"""RMSNorm on Triton kernels, as stages: see ``kernels.rms``."""

from __future__ import annotations

from torch import Tensor

from ..contract import flat, unflat
from ..kernels import rms
from ..kernels.config import RMS_NORM_COLUMNS
from ..ops import operators
from ..replay.stage import stage


def can_run(x: Tensor) -> bool:
    """Whether a tile holds one of these rows, of which there is one at least."""
    return x.numel() > 0 and x.shape[-1] <= RMS_NORM_COLUMNS


def rms_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """y [..., K] of x [..., K]."""
    with operators.context("triton", x):
        return _rms_norm(_contiguous(x), _contiguous(weight), offset=offset, eps=eps)[0]


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """dx [..., K] of dy and x [..., K]."""
    with operators.context("triton", x):
        tensors = _contiguous(dy), _contiguous(x), _contiguous(weight)
        return _rms_norm_backward(*tensors, offset=offset, eps=eps)[0]


def _contiguous(t: Tensor) -> Tensor:
    return t if t.is_contiguous() else t.contiguous()


@stage
def _rms_norm(x, weight, *, offset, eps):
    y = rms.rms_norm(flat(x), weight, offset, eps)
    return (unflat(y, x.shape[:-1]),)


@stage
def _rms_norm_backward(dy, x, weight, *, offset, eps):
    dx = rms.rms_norm_backward(flat(dy), flat(x), weight, offset, eps)
    return (unflat(dx, x.shape[:-1]),)
