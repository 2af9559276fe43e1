"""What a call is given, and the choice of its backend: checks with clear errors."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings

import torch
from torch import Tensor

from .. import _private
from ..contract import BACKENDS, NORM_ORDERS, Backend, Evaluation, Options
from ..quantized import Quantized

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT_DTYPES = (*_TRITON_DTYPES, torch.float64)
_FLOAT_NAMES = "float32, bfloat16, float16 or float64"
_MAX_RANK = 512
USE_FSDP2 = "shard by FSDP2 (torch.distributed.fsdp.fully_shard; fsdp_version: 2 of accelerate)"


# --- the choice of backend -------------------------------------------------------------------------------------------


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run on this device and dtype, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"it computes in float32, bfloat16 and float16, got {dtype}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type == "meta":
        return None  # shapes and dtypes alone
    if device.type != "cuda":
        return f"it needs a CUDA device (or TRITON_INTERPRET=1 for Triton's interpreter), got {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


# What torch.compiler.assume_constant_result sets; the decorator would import the compiler, and Triton with it.
vars(triton_problem)["_dynamo_marked_constant"] = True


def rank_problem(rank: int) -> str | None:
    """Why the Triton backend cannot run on this rank, or None if it can."""
    return None if rank <= _MAX_RANK else f"it supports lora_A of rank up to {_MAX_RANK}, got rank {rank}"


def _warn_once(problem: str) -> None:
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(
            f'A layer on a CUDA device runs on the "torch" backend, which is slower than "triton": {problem}. '
            'bora_kernels.explain(model) lists such layers; backend="torch" chooses it without this warning.',
            stacklevel=2,
        )


_warned: set[str] = set()
vars(_warn_once)["_dynamo_marked_constant"] = True  # warns while the compiler traces


def choose_backend(backend: Evaluation | None, device: torch.device, dtype: torch.dtype, rank: int) -> Backend:
    """``backend`` if it can run, or the default: "triton" on CUDA devices that it supports, else "torch"."""
    if backend is None:
        if device.type != "cuda":
            return "torch"
        problem = triton_problem(device, dtype) or rank_problem(rank)
        if problem is not None:
            _warn_once(problem)
        return "triton" if problem is None else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "triton":
        problem = triton_problem(device, dtype) or rank_problem(rank)
        if problem is not None:
            raise ValueError(f'backend="triton" cannot run here: {problem}')
    return backend


# --- checks ----------------------------------------------------------------------------------------------------------


def check_options(options: Options) -> None:
    """Raise ValueError for an option outside its range."""
    scaling, norm_order, _, dropout_p, eps, _ = options
    if not -math.inf < scaling < math.inf:  # comparisons, which the compiler traces for a scaling that varies
        raise ValueError(f"scaling must be finite, got {scaling}")
    if norm_order not in NORM_ORDERS:
        raise ValueError(f"norm_order must be one of {', '.join(NORM_ORDERS)}, got {norm_order!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if not 0.0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")


def check_weight(weight: object, name: str = "weight", *, sharded: bool = False) -> None:
    """Raise TypeError or ValueError for a base weight that the layer cannot read: quantized, sharded, not 2-D.

    ``sharded`` admits a DTensor.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(weight).__name__}")
    if not sharded and not torch.compiler.is_compiling() and type(weight) not in (Tensor, torch.nn.Parameter):
        if _private.is_wrapper(weight):
            kind = type(weight).__name__
            raise TypeError(f"{name} must be a plain dense tensor, got a {kind} (sharded or quantized)")
    if weight.dtype not in _FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be {_FLOAT_NAMES}, got {weight.dtype} "
            f"({type(weight).__name__}: a quantized weight must be dequantized first)"
        )
    if weight.ndim != 2:
        raise ValueError(f"{name} must be [out_features, in_features], got shape {list(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"{name} must have at least one row and one column, got shape {list(weight.shape)}")


def check_tensors(
    x: Tensor,
    weight: Tensor | Quantized,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    bias: Tensor | None,
    *,
    sharded: bool = False,
    part_of_x: bool = False,
) -> None:
    """Raise TypeError or ValueError that names the argument, what was expected and what came.

    ``part_of_x``: x is a rank's part of one, whose shape was looked at.
    """
    is_quantized = isinstance(weight, Quantized)
    if not is_quantized:  # a quantized weight was checked when it was read
        check_weight(weight, sharded=sharded)
    if weight.requires_grad and torch.is_grad_enabled():
        if isinstance(weight, Tensor) and getattr(weight._base, "_is_flat_param", False):
            raise ValueError(
                "weight must be a parameter of its own, got a part of FullyShardedDataParallel's flat one, which "
                f"requires a gradient: {USE_FSDP2}"
            )
        raise ValueError("weight must be frozen (requires_grad=False): the fused layer computes no gradient for it")
    N, K = weight.shape
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if not part_of_x and (x.ndim == 0 or x.shape[-1] != K):
        raise ValueError(f"x must be [..., {K}] for weight [{N}, {K}], got {list(x.shape)}")
    if x.dtype not in _FLOAT_DTYPES:
        raise TypeError(f"x must be {_FLOAT_NAMES}, got {x.dtype}")
    if not is_quantized and x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise TypeError(f"x must have weight's dtype {weight.dtype} (or run under torch.autocast), got {x.dtype}")
    if not isinstance(lora_A, Tensor) or lora_A.ndim != 2 or lora_A.shape[0] < 1:
        raise ValueError(f"lora_A must be [rank, {K}] with rank >= 1, got {_describe(lora_A)}")
    R = lora_A.shape[0]
    expected = {
        "lora_A": (lora_A, (R, K)),
        "lora_B": (lora_B, (N, R)),
        "magnitude_row": (magnitude_row, (N,)),
        "magnitude_col": (magnitude_col, (K,)),
        "bias": (bias, (N,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None and name not in ("lora_A", "lora_B"):
            continue
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {_describe(tensor)}")
        if tensor.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"{name} must be {_FLOAT_NAMES}, got {tensor.dtype}")
    for name, argument in {"weight": weight, **{name: tensor for name, (tensor, _) in expected.items()}}.items():
        if argument is not None and argument.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {argument.device}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What ``torch.autocast`` makes of x, or None where it leaves x alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _describe(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
