"""RMSNorm on Triton kernels, as stages: see ``kernels.rms``."""

from __future__ import annotations

from torch import Tensor

from ..kernels import rms
from ..kernels.config import RMS_NORM_COLUMNS
from ..ops import operators
from ..ops.autograd import flat
from ..replay.stage import stage


def can_run(x: Tensor) -> bool:
    """Whether a tile holds one of these rows, of which there is one at least."""
    return x.numel() > 0 and x.shape[-1] <= RMS_NORM_COLUMNS


def rms_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """y [..., K] of x [..., K]."""
    with operators.context("triton", x):
        return _rms_norm(flat(x).contiguous(), weight.contiguous(), offset=offset, eps=eps)[0].view(x.shape)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """dx [..., K] of dy and x [..., K]."""
    with operators.context("triton", x):
        tensors = flat(dy).contiguous(), flat(x).contiguous(), weight.contiguous()
        return _rms_norm_backward(*tensors, offset=offset, eps=eps)[0].view(dy.shape)


@stage
def _rms_norm(x, weight, *, offset, eps):
    return (rms.rms_norm(x, weight, offset, eps),)


@stage
def _rms_norm_backward(dy, x, weight, *, offset, eps):
    return (rms.rms_norm_backward(dy, x, weight, offset, eps),)
