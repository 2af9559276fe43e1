"""Validation, the choice of backend, and the operators that eager mode and ``torch.compile`` both see.

Three operators make a layer: ``scales`` (norms of the adapted weight), ``forward`` and ``backward``. Each takes the
backend's name and hands over to ``factored`` ("torch") or ``fused`` ("triton"). Operators return tensors only, so an
absent result is an empty tensor between here and the backends.
"""

from __future__ import annotations

import importlib.util
import math
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from . import factored
from .plan import NORM_ORDERS, Needs, Scales, accumulation_dtype, projection_parts, separate_product

BACKENDS = ("triton", "torch", "reference")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT_DTYPES = (*_TRITON_DTYPES, torch.float64)
_MAX_RANK = 512


# --- the choice of backend -------------------------------------------------------------------------------------------


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run on this device and dtype, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"it computes in float32, bfloat16 and float16, got {dtype}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device (or TRITON_INTERPRET=1 for Triton's interpreter), got {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


# What torch.compiler.assume_constant_result sets; the decorator would import the compiler, and Triton with it.
triton_problem._dynamo_marked_constant = True


def choose_backend(backend: str | None, device: torch.device, dtype: torch.dtype, rank: int) -> str:
    """``backend`` if it can run, or the default: "triton" on CUDA devices that it supports, else "torch"."""
    if backend is None:
        usable = device.type == "cuda" and rank <= _MAX_RANK and triton_problem(device, dtype) is None
        return "triton" if usable else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "triton":
        problem = triton_problem(device, dtype)
        if problem is not None:
            raise ValueError(f'backend="triton" cannot run here: {problem}')
        if rank > _MAX_RANK:
            raise ValueError(f'backend="triton" supports lora_A of rank up to {_MAX_RANK}, got rank {rank}')
    return backend


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return factored
    from . import fused  # Triton is imported only when it is used

    return fused


def _context(backend: str, tensor: Tensor) -> AbstractContextManager:
    """What a backend runs in: PyTorch operations without autocast, kernels on the tensor's device."""
    if backend == "torch":
        return torch.autocast(tensor.device.type, enabled=False)
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def draw_dropout(x: Tensor, dropout_p: float, backend: str) -> Tensor:
    """What the backend's dropout is a function of: a seed [1] for "triton", the keep mask [M, K] for "torch"."""
    if backend == "triton":
        return torch.randint(0, 2**31 - 1, (1,), device=x.device)
    return torch.rand(x.shape, device=x.device) >= dropout_p


# --- validation ------------------------------------------------------------------------------------------------------


def check_options(*, scaling: float, norm_order: str, dropout_p: float, eps: float) -> None:
    """Raise ValueError for an option outside its range."""
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if norm_order not in NORM_ORDERS:
        raise ValueError(f"norm_order must be one of {', '.join(NORM_ORDERS)}, got {norm_order!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if not (math.isfinite(eps) and eps > 0.0):
        raise ValueError(f"eps must be positive and finite, got {eps}")


def check_weight(weight: Tensor, name: str = "weight", *, sharded: bool = False) -> None:
    """Raise TypeError or ValueError for a base weight that the layer cannot read: quantized, sharded, not 2-D.

    ``sharded`` admits a DTensor.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(weight).__name__}")
    if not sharded and not torch.compiler.is_compiling() and type(weight) not in (Tensor, torch.nn.Parameter):
        from torch.utils._python_dispatch import is_traceable_wrapper_subclass

        if is_traceable_wrapper_subclass(weight):
            kind = type(weight).__name__
            raise TypeError(f"{name} must be a plain dense tensor, got a {kind} (sharded or quantized)")
    if weight.dtype not in _FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {weight.dtype} "
            f"({type(weight).__name__}: a quantized weight must be dequantized first)"
        )
    if weight.ndim != 2:
        raise ValueError(f"{name} must be [out_features, in_features], got shape {list(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"{name} must have at least one row and one column, got shape {list(weight.shape)}")


def check_tensors(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    bias: Tensor | None,
    *,
    sharded: bool = False,
) -> None:
    """Raise TypeError or ValueError that names the argument, what was expected and what came."""
    check_weight(weight, sharded=sharded)
    if weight.requires_grad:
        raise ValueError("weight must be frozen (requires_grad=False): the fused layer computes no gradient for it")
    N, K = weight.shape
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] for weight [{N}, {K}], got {list(x.shape)}")
    if x.dtype not in _FLOAT_DTYPES:
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must have weight's dtype {weight.dtype} (or run under torch.autocast), got {x.dtype}")
    if not isinstance(lora_A, Tensor) or lora_A.ndim != 2 or lora_A.shape[0] < 1:
        raise ValueError(f"lora_A must be [rank, {K}] with rank >= 1, got {_describe(lora_A)}")
    R = lora_A.shape[0]
    if magnitude_row is None and magnitude_col is not None:
        raise ValueError("magnitude_row must be given with magnitude_col (both None is LoRA), got None")
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
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    for name, (tensor, _) in {"weight": (weight, None), **expected}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _describe(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


# --- operators -------------------------------------------------------------------------------------------------------

_library = torch.library.Library("bora_kernels", "DEF")
_library.define(
    "scales(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude_row, Tensor? magnitude_col, float scaling,"
    " str norm_order, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? row_scale, Tensor? col_scale, Tensor? bias,"
    " Tensor? dropout, float scaling, float dropout_p, bool save_product, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude_row,"
    " Tensor? magnitude_col, Tensor? row_norm, Tensor? col_norm, Tensor? row_scale, Tensor? col_scale,"
    " Tensor? row_product, Tensor? col_product, Tensor? product, Tensor? u, Tensor? dropout, float scaling,"
    " str norm_order, bool detach_norm, float dropout_p, float eps, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _tensors(like: Tensor, *values: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if value is None else value for value in values)


def _contiguous(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Kernels read magnitudes and biases without a stride."""
    return tuple(None if vector is None else vector.contiguous() for vector in vectors)


def _scales(weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling, norm_order, eps, backend):
    compute = _implementation(backend).compute_scales
    magnitude_row, magnitude_col = _contiguous(magnitude_row, magnitude_col)
    with _context(backend, weight):
        scales = compute(
            weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling=scaling, norm_order=norm_order, eps=eps
        )
    return _tensors(lora_A, *scales)


def _scales_fake(weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling, norm_order, eps, backend):
    dtype = accumulation_dtype(weight.dtype)

    def like(magnitude: Tensor | None, *columns: int) -> Tensor | None:
        return None if magnitude is None else weight.new_empty(magnitude.shape[0], *columns, dtype=dtype)

    pairs = [like(magnitude_row), like(magnitude_col), like(magnitude_row), like(magnitude_col)]
    if backend == "triton":
        pairs += [like(magnitude_row, lora_A.shape[0]), like(magnitude_col, lora_A.shape[0])]
    return _tensors(lora_A, *pairs, *[None] * (6 - len(pairs)))


def _forward(x, weight, lora_A, lora_B, row_scale, col_scale, bias, dropout, scaling, dropout_p, save_product, backend):
    row_scale, col_scale, bias = _contiguous(row_scale, col_scale, bias)
    scales = Scales(row_scale=row_scale, col_scale=col_scale)
    with _context(backend, x):
        y, product, u = _implementation(backend).forward(
            x, weight, lora_A, lora_B, scales, bias, dropout,
            scaling=scaling, dropout_p=dropout_p, save_product=save_product,
        )  # fmt: skip
    return _tensors(x, y, product, u)


def _forward_fake(
    x, weight, lora_A, lora_B, row_scale, col_scale, bias, dropout, scaling, dropout_p, save_product, backend
):
    y = x.new_empty(x.shape[0], weight.shape[0])
    product = torch.empty_like(y) if save_product and separate_product(x.dtype, bias) else None
    rank, columns = lora_A.shape
    parts = [projection_parts(columns, rank)] if backend == "triton" else []
    u = x.new_empty(*parts, x.shape[0], rank, dtype=accumulation_dtype(x.dtype))
    return _tensors(x, y, product, u)


def _backward(
    dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, row_norm, col_norm, row_scale, col_scale,
    row_product, col_product, product, u, dropout, scaling, norm_order, detach_norm, dropout_p, eps, needs, backend,
):  # fmt: skip
    if dy.shape[0] == 0:  # no token, no gradient, and nothing that a kernel could be launched on
        gradients = _backward_fake(
            dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, row_norm, col_norm, row_scale, col_scale,
            row_product, col_product, product, u, dropout, scaling, norm_order, detach_norm, dropout_p, eps, needs,
            backend,
        )  # fmt: skip
        return tuple(gradient.zero_() for gradient in gradients)
    magnitude_row, magnitude_col = _contiguous(magnitude_row, magnitude_col)
    scales = Scales(row_norm, col_norm, row_scale, col_scale, row_product, col_product)
    with torch.autocast(dy.device.type, enabled=False):
        gradients = _implementation(backend).backward(
            dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, product, u, dropout,
            scaling=scaling, norm_order=norm_order, detach_norm=detach_norm, dropout_p=dropout_p, eps=eps,
            needs=Needs(*needs),
        )  # fmt: skip
    return _tensors(dy, *(None if gradient is None else gradient.contiguous() for gradient in gradients))


def _backward_fake(
    dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, row_norm, col_norm, row_scale, col_scale,
    row_product, col_product, product, u, dropout, scaling, norm_order, detach_norm, dropout_p, eps, needs, backend,
):  # fmt: skip
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if needs[0] else None  # x itself may be absent
    wanted = zip((lora_A, lora_B, magnitude_row, magnitude_col), needs[1:], strict=True)
    rest = (torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None for t, need in wanted)
    return _tensors(dy, dx, *rest)


def _without_autocast(operator, device_type: str):
    """The autocast rule: x (or dy) arrives in the autocast dtype from ``bora_linear``; nothing else is cast."""

    def call(*arguments):
        with torch.autocast(device_type, enabled=False):
            return operator(*arguments)

    return call


for _name, _body, _fake in (
    ("scales", _scales, _scales_fake),
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bora_kernels::{_name}", _fake, lib=_library)
    _operator = getattr(torch.ops.bora_kernels, _name).default
    for _device_type in ("cuda", "cpu"):
        _library.impl(_name, _without_autocast(_operator, _device_type), f"Autocast{_device_type.upper()}")
