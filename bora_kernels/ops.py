"""Validation, the choice of backend, and the operators that eager mode and ``torch.compile`` both see.

Three operators make a layer: ``scales`` (norms of the adapted weight), ``forward`` and ``backward``. Each takes the
backend's name and hands over to ``factored`` ("torch") or ``fused`` ("triton"). Operators return tensors only, so an
absent result is an empty tensor between here and the backends.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, is_traceable_wrapper_subclass

from . import factored
from .plan import NORM_ORDERS, Needs, accumulation_dtype, projection_parts, scales_size, separate_product
from .quantized import Quantized

BACKENDS = ("triton", "torch", "reference")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT_DTYPES = (*_TRITON_DTYPES, torch.float64)
_MAX_RANK = 512
_NOTHING = nullcontext()


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
_warn_once._dynamo_marked_constant = True  # warns while the compiler traces


def choose_backend(backend: str | None, device: torch.device, dtype: torch.dtype, rank: int) -> str:
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


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return factored
    from . import fused  # Triton is imported only when it is used

    return fused


def _context(backend: str, tensor: Tensor) -> AbstractContextManager:
    """What a backend runs in: PyTorch operations without autocast, kernels on the tensor's device."""
    if backend == "torch":
        kind = tensor.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


def draw_dropout(x: Tensor, dropout_p: float, backend: str) -> Tensor:
    """What the backend's dropout is a function of: a seed [1] for "triton", the keep mask [M, K] for "torch"."""
    if backend == "triton":
        return torch.randint(0, 2**31 - 1, (1,), device=x.device)
    return torch.rand((x.numel() // x.shape[-1], x.shape[-1]), device=x.device) >= dropout_p


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
    weight: Tensor | Quantized,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude_row: Tensor | None,
    magnitude_col: Tensor | None,
    bias: Tensor | None,
    *,
    sharded: bool = False,
) -> None:
    """Raise TypeError or ValueError that names the argument, what was expected and what came."""
    is_quantized = isinstance(weight, Quantized)
    if not is_quantized:  # a quantized weight was checked when it was read
        check_weight(weight, sharded=sharded)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen (requires_grad=False): the fused layer computes no gradient for it")
    N, K = weight.shape
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] for weight [{N}, {K}], got {list(x.shape)}")
    if x.dtype not in _FLOAT_DTYPES:
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if not is_quantized and x.dtype != weight.dtype and autocast_dtype(x) is None:
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


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What ``torch.autocast`` makes of x, or None where it leaves x alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class Prepared:
    """A call whose arguments were checked: its backend, and an identity for all that its kernels' plans depend on."""

    def __init__(self, backend: str) -> None:
        self.backend = backend


_prepared: dict[tuple, Prepared] = {}
_MOST_PREPARED = 1024


def prepare(x: Tensor, tensors: tuple[Tensor | None, ...], backend: str | None) -> tuple[str, Prepared | None]:
    """Check the tensors of a call (after x: weight, factors, magnitudes, bias) and choose its backend.

    Outside of ``torch.compile`` the answer is remembered. It depends on the tensors' kinds, shapes, strides, dtypes,
    devices and alignments, so the same object stands for these in what follows.
    """
    signature = None
    autocast = autocast_dtype(x) if isinstance(x, Tensor) else None
    if not torch.compiler.is_compiling() and _PREPARED_TYPES.issuperset(map(type, (x, *tensors))):
        signature = (backend, autocast, *map(_layout, (x, *tensors)))
        known = _prepared.get(signature)
        if known is not None:
            return known.backend, known
    check_tensors(x, *tensors)
    chosen = choose_backend(backend, x.device, autocast or x.dtype, tensors[1].shape[0])
    if signature is None or tensors[0].requires_grad:  # refused as soon as gradients are recorded
        return chosen, None
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    known = _prepared[signature] = Prepared(chosen)
    return chosen, known


def _layout(tensor: object) -> tuple | None:
    """What a tensor is, but for the values that it holds."""
    if isinstance(tensor, Quantized):
        return (tensor.layout, *map(_layout, tensor.parts))
    if not isinstance(tensor, Tensor):
        return tensor if tensor is None else (type(tensor),)
    alignment = tensor.data_ptr() & 15
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, alignment


def _describe(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


# --- operators -------------------------------------------------------------------------------------------------------

_library = torch.library.Library("bora_kernels", "DEF")
_library.define(
    "scales(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude_row, Tensor? magnitude_col, float scaling,"
    " str norm_order, float eps, bool products, str backend) -> Tensor"
)
_library.define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? scales, Tensor? bias, Tensor? dropout,"
    " float scaling, float dropout_p, bool has_col, bool save_product, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude_row,"
    " Tensor? magnitude_col, Tensor? scales, Tensor? product, Tensor? u, Tensor? dropout, float scaling,"
    " str norm_order, bool detach_norm, float dropout_p, float eps, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _empty_for_none(like: Tensor, values: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if value is None else value for value in values)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    """Kernels read magnitudes and biases without a stride."""
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def _scales(
    weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling, norm_order, eps, products, backend, prepared=None
):  # fmt: skip
    with _context(backend, weight):
        return _implementation(backend).compute_scales(
            weight, lora_A, lora_B, _contiguous(magnitude_row), _contiguous(magnitude_col),
            scaling=scaling, norm_order=norm_order, eps=eps, products=products, prepared=prepared,
        )  # fmt: skip


def _scales_fake(weight, lora_A, lora_B, magnitude_row, magnitude_col, scaling, norm_order, eps, products, backend):
    if magnitude_row is None:
        return None
    products = products and backend == "triton"
    size = scales_size(*weight.shape, lora_A.shape[0], magnitude_col is not None, products)
    return weight.new_empty(size, dtype=accumulation_dtype(weight.dtype))


def _forward(
    x, weight, lora_A, lora_B, scales, bias, dropout, scaling, dropout_p, has_col, save_product, backend, prepared=None
):  # fmt: skip
    with _context(backend, x):
        return _implementation(backend).forward(
            x, weight, lora_A, lora_B, scales, _contiguous(bias), dropout,
            scaling=scaling, dropout_p=dropout_p, has_col=has_col, save_product=save_product, prepared=prepared,
        )  # fmt: skip


def _forward_fake(
    x, weight, lora_A, lora_B, scales, bias, dropout, scaling, dropout_p, has_col, save_product, backend
):  # fmt: skip
    y = x.new_empty(x.shape[0], weight.shape[0])
    product = torch.empty_like(y) if save_product and separate_product(x.dtype, bias) else None
    rank, columns = lora_A.shape
    parts = [projection_parts(columns, rank)] if backend == "triton" else []
    u = x.new_empty(*parts, x.shape[0], rank, dtype=accumulation_dtype(x.dtype))
    return y, product, u


def _backward(
    dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, product, u, dropout,
    scaling, norm_order, detach_norm, dropout_p, eps, needs, backend,
):  # fmt: skip
    arguments = (dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, product, u, dropout)
    if dy.shape[0] == 0:  # no token, no gradient, and nothing that a kernel could be launched on
        options = (scaling, norm_order, detach_norm, dropout_p, eps, needs, backend)
        return tuple(None if g is None else g.zero_() for g in _backward_fake(*arguments, *options))
    with _context(backend, dy):
        gradients = _implementation(backend).backward(
            *arguments[:5], _contiguous(magnitude_row), _contiguous(magnitude_col), *arguments[7:],
            scaling=scaling, norm_order=norm_order, detach_norm=detach_norm, dropout_p=dropout_p, eps=eps,
            needs=Needs(*needs),
        )  # fmt: skip
    wanted = zip(gradients, (dy, lora_A, lora_B, magnitude_row, magnitude_col), strict=True)
    return tuple(g if g is None or g.dtype == t.dtype else g.to(t.dtype) for g, t in wanted)


def _backward_fake(
    dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, scales, product, u, dropout,
    scaling, norm_order, detach_norm, dropout_p, eps, needs, backend,
):  # fmt: skip
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if needs[0] else None  # x itself may be absent
    wanted = zip((lora_A, lora_B, magnitude_row, magnitude_col), needs[1:], strict=True)
    rest = (torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None for t, need in wanted)
    return dx, *rest


def _without_autocast(operator, device_type: str):
    """The autocast rule: x (or dy) arrives in the autocast dtype from ``bora_linear``; nothing else is cast."""

    def call(*arguments):
        with torch.autocast(device_type, enabled=False):
            return operator(*arguments)

    return call


def _define(name: str, body: Callable, fake: Callable) -> Callable:
    """Register an operator, and return what calls it: in plain eager mode the body itself, which costs less time.

    An operator returns tensors only, so an absent result is an empty tensor there and None where the body is called.
    ``prepared`` (of all arguments) is for the body only.
    """

    def with_empty(function):
        def call(*arguments):
            results = function(*arguments)
            like = next(argument for argument in arguments if isinstance(argument, Tensor))
            if isinstance(results, tuple):
                return _empty_for_none(like, results)
            return _empty_for_none(like, (results,))[0]

        return call

    _library.impl(name, with_empty(body), "CompositeExplicitAutograd")
    torch.library.register_fake(f"bora_kernels::{name}", with_empty(fake), lib=_library)
    operator = getattr(torch.ops.bora_kernels, name).default
    for device_type in ("cuda", "cpu"):
        _library.impl(name, _without_autocast(operator, device_type), f"Autocast{device_type.upper()}")

    def call(*arguments, prepared: Prepared | None = None):
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return operator(*arguments)
        if not _PLAIN.issuperset(map(type, arguments)):
            return operator(*arguments)  # tensor subclasses have rules of their own
        return body(*arguments) if prepared is None else body(*arguments, prepared=prepared)

    return call


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), float, int, bool, str, list))
_PREPARED_TYPES = _PLAIN | {Quantized}

scales = _define("scales", _scales, _scales_fake)
forward = _define("forward", _forward, _forward_fake)
backward = _define("backward", _backward, _backward_fake)
