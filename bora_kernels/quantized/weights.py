"""Frozen weights that stay quantized: how libraries store them, and how they become dense for a moment.

    kind          library                                W0 [N, K]
    "nf4", "fp4"  bitsandbytes Linear4bit                code[nibble]·absmax[block], blocks of the flattened weight
    "int8"        bitsandbytes Linear8bitLt              data·scale[row] / 127
    "affine"      torchao int8 and float8, weight-only   (data − zero_point)·scale[block]

With double quantization absmax is itself nested_code[absmax]·nested_absmax[block] + offset. The layer keeps and saves
the stored tensors only: forward and backward each ask the operator ``dequantize`` for a dense weight that lives no
longer than they run. What a weight is worth is what its library's own dequantization says, in the library's dtype.

Sources: QLoRA, arXiv 2305.14314, section 3 (NF4, double quantization); LLM.int8(), arXiv 2208.07339, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from .._library import define
from ..contract import CHUNK_ELEMENTS

_FOUR_BIT = ("nf4", "fp4")
TENSOR_NAMES = {
    "nf4": ("packed", "code", "absmax", "nested_absmax", "nested_code", "offset"),
    "fp4": ("packed", "code", "absmax", "nested_absmax", "nested_code", "offset"),
    "int8": ("data", "scale"),
    "affine": ("data", "scale", "zero_point"),
}
_INT8_STEP = 7.874015718698502e-3  # 1/127, as bitsandbytes rounds it


class Layout(NamedTuple):
    """How a quantized weight is stored, apart from its tensors."""

    kind: str
    shape: tuple[int, int]  # [N, K]
    dtype: torch.dtype  # of the weight that it stands for
    block_size: tuple[int, ...]  # 4 bits: elements for each absmax (and absmax for each nested one); else rows, columns

    @property
    def exact_dtype(self) -> torch.dtype:
        """What a dense weight of any dtype is rounded from."""
        return torch.float32 if self.kind == "int8" else self.dtype


@final
class Quantized(NamedTuple):
    """A quantized weight: its layout and its stored tensors. ``bora_linear`` takes one in place of a dense weight."""

    layout: Layout
    tensors: tuple[Tensor, ...]

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def ndim(self) -> int:
        return 2

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that it stands for."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def dense(self, dtype: torch.dtype | None = None, *, backend: str = "torch", caller: str = "") -> Tensor:
        """The dequantized weight [N, K], rounded from ``layout.exact_dtype`` to ``dtype`` (None: ``layout.dtype``)."""
        return dense(self.layout, self.tensors, dtype or self.layout.dtype, backend, caller)


def dense(
    layout: Layout, tensors: Sequence[Tensor], dtype: torch.dtype, backend: str, caller: str, *,
    direct: bool = False, prepared: object = None,
) -> Tensor:  # fmt: skip
    """The dequantized weight [N, K] in ``dtype``.

    ``caller`` is its name. It tells the compiler that the weight made in forward is not to be kept for backward,
    which it would do with two calls that look alike. ``direct`` says that nothing needs the dispatcher, which takes the
    host longer than the launch (``ops.operators.is_direct``); ``prepared`` then stands for the tensors, as in a stage.
    """
    kind, shape, own_dtype, block_size = layout
    if direct:
        return _dequantize(tensors, kind, shape, block_size, own_dtype, dtype, caller, backend, prepared)
    return torch.ops.bora_kernels.dequantize(
        list(tensors), kind, list(shape), list(block_size), own_dtype, dtype, caller, backend
    )


# --- reading what libraries store ------------------------------------------------------------------------------------


def read(linear: nn.Module) -> Quantized | None:
    """The quantized weight of a linear layer, or None if its weight is none that this file knows.

    Shares the layer's tensors. Raises ValueError or TypeError for a layout that is known but cannot be read.
    """
    weight: Any = linear.weight
    name = type(weight).__name__
    state = getattr(weight, "quant_state", None)
    if state is None:  # sharding engines replace the parameter; the layer still knows
        state = getattr(linear, "quant_state", None)
    if state is not None or name == "Params4bit":
        return _read_4bit(linear, weight, state)
    if name == "Int8Params":
        return _read_int8(linear, weight)
    if name in ("Int8Tensor", "Float8Tensor") and type(weight).__module__.startswith("torchao."):
        return _read_affine(weight, name)
    return None


def _read_4bit(linear: Any, weight: Tensor, state: Any) -> Quantized:
    if state is None:
        raise ValueError("linear.weight must be quantized, got a Linear4bit before its move to a device")
    if state.quant_type not in _FOUR_BIT:
        raise ValueError(f"linear.weight must be of quant_type nf4 or fp4, got {state.quant_type!r}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "linear.weight must be in bitsandbytes' storage format, got the one that Linear4bit converts to when it "
            "runs in eval mode on a CPU (the conversion loses precision): load the layer anew and adapt it before that"
        )
    storage = getattr(weight, "quant_storage", weight.dtype)
    if weight.dtype != storage:
        raise TypeError(
            f"linear.weight must be stored as {storage}, got {weight.dtype}: a cast destroyed the 4-bit data"
        )
    N, K = _checked_shape(state.shape, linear)
    packed = _plain(weight)
    if packed.dtype != torch.uint8:
        packed = packed.view(torch.uint8)
    if packed.numel() != (N * K + 1) // 2:
        raise ValueError(
            f"linear.weight must hold {(N * K + 1) // 2} bytes for [{N}, {K}], got {packed.numel()} (sharded)"
        )
    tensors: tuple[Tensor, ...] = (packed, state.code, state.absmax)
    block_size: tuple[int, ...] = (state.blocksize,)
    if state.nested:
        tensors += (state.state2.absmax, state.state2.code, state.offset)
        block_size += (state.state2.blocksize,)
    return Quantized(Layout(state.quant_type, (N, K), state.dtype, block_size), tensors)


def _read_int8(linear: Any, weight: Any) -> Quantized:
    if weight.dtype != torch.int8:
        raise ValueError(
            f"linear.weight must be int8, got {weight.dtype}: a Linear8bitLt needs has_fp16_weights=False and a move "
            "to a device"
        )
    # the first forward of a Linear8bitLt moves the scales from the weight to the layer's state
    scale = weight.SCB if weight.SCB is not None else linear.state.SCB
    if scale is None:
        raise ValueError("linear.weight must come with its scales, got None for SCB of the weight and of the layer")
    N, K = _checked_shape(weight.shape, linear)
    return Quantized(Layout("int8", (N, K), torch.float16, (1, K)), (_plain(weight), scale))


def _read_affine(weight: Any, name: str) -> Quantized:
    for attribute in ("act_quant_kwargs", "act_pre_scale"):
        if getattr(weight, attribute, None) is not None:
            raise ValueError(f"linear.weight must be weight-only quantized, got {name} with {attribute}")
    if weight.ndim != 2:
        raise ValueError(f"linear.weight must be [out_features, in_features], got shape {list(weight.shape)}")
    N, K = weight.shape
    scale, zero_point = weight.scale, getattr(weight, "zero_point", None)
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    if scale.ndim != 2 or N % scale.shape[0] or K % scale.shape[1]:
        raise ValueError(f"linear.weight must have a scale for each block of [{N}, {K}], got {list(scale.shape)}")
    tensors = (weight.qdata, scale) if zero_point is None else (weight.qdata, scale, zero_point.reshape(scale.shape))
    return Quantized(Layout("affine", (N, K), weight.dtype, (N // scale.shape[0], K // scale.shape[1])), tensors)


def _plain(weight: Tensor) -> Tensor:
    """The same memory as a Tensor of no subclass, which operators return as they get it."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach()


def _checked_shape(shape: torch.Size, linear: Any) -> tuple[int, int]:
    if tuple(shape) != (linear.out_features, linear.in_features):
        expected = [linear.out_features, linear.in_features]
        raise ValueError(f"linear.weight must be {expected}, got {list(shape)}")
    return linear.out_features, linear.in_features


# --- the operator ----------------------------------------------------------------------------------------------------

_library = define(
    "dequantize(Tensor[] tensors, str kind, int[] shape, int[] block_size, ScalarType own_dtype, ScalarType dtype,"
    " str caller, str backend) -> Tensor"
)


def _dequantize(tensors, kind, shape, block_size, own_dtype, dtype, caller, backend, prepared=None):
    if kind not in _FOUR_BIT:
        return _dequantize_rows(tensors, kind, shape, block_size, own_dtype, dtype)
    # from float32 the rounding to dtype is the only one, so the wide weight need not exist
    made = dtype if own_dtype == torch.float32 and dtype != torch.float64 else own_dtype
    if backend == "triton":
        from ..kernels import nf4

        with torch.cuda.device_of(tensors[0]):
            return nf4.dequantize_nf4(tensors, shape, block_size, made, prepared).to(dtype)
    import bitsandbytes  # noqa: F401  (registers its operators)

    packed, _, absmax, *nested = tensors
    if nested:
        nested_absmax, nested_code, offset = nested
        absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
            absmax, nested_absmax, nested_code, block_size[1], torch.float32
        )
        absmax += offset
    # As one row: the library's CPU kernels read wrong absmax where a row is not a whole number of blocks.
    row = [1, shape[0] * shape[1]]
    made_row = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax.float(), block_size[0], kind, row, made)
    return made_row.view(shape).to(dtype)


def _dequantize_rows(tensors, kind, shape, block_size, own_dtype, dtype):
    """Scaled integers or float8, in blocks of rows: float32 is never made for the whole weight."""
    data, scale, *zero_point = tensors
    (N, K), (block_n, block_k) = shape, block_size
    scale = scale.view(N // block_n, K // block_k)
    out = torch.empty(shape, dtype=dtype, device=data.device)
    step = max(1, CHUNK_ELEMENTS // K)
    for start in range(0, N, step):
        wide = data[start : start + step].float().view(-1, K // block_k, block_k)
        blocks = torch.arange(start, start + len(wide), device=data.device) // block_n
        if zero_point:
            wide -= zero_point[0][blocks].float()[:, :, None]
        wide *= scale[blocks][:, :, None]
        if kind == "int8":
            wide *= _INT8_STEP
        else:
            wide = wide.to(own_dtype)
        out[start : start + step] = wide.view(-1, K)
    return out


def _dequantize_fake(tensors, kind, shape, block_size, own_dtype, dtype, caller, backend):
    return torch.empty(shape, dtype=dtype, device=tensors[0].device)


_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("bora_kernels::dequantize", _dequantize_fake, lib=_library)


# --- quantizing again ------------------------------------------------------------------------------------------------


def quantize_like(weight: Tensor, layout: Layout, tensors: tuple[Tensor, ...]) -> Quantized:
    """A dense weight [N, K] quantized by the library of ``layout``, in the same layout.

    It rounds as the library does, see ``FusedBoraLinear.merge``. Raises ValueError for torchao scales that are not one
    for each row.
    """
    kind, shape, dtype, block_size = layout
    if kind in _FOUR_BIT:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight.to(dtype), blocksize=block_size[0], compress_statistics=len(block_size) == 2, quant_type=kind
        )
        new = (packed, state.code, state.absmax)
        new += (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        return Quantized(layout, new)
    if kind == "int8":
        from bitsandbytes.functional import int8_vectorwise_quant

        return Quantized(layout, int8_vectorwise_quant(weight.to(dtype))[:2])
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if block_size != (1, shape[1]):
        raise ValueError(f"requantize needs a scale for each row, got one for each block of {list(block_size)}")
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    integers = tensors[0].dtype == torch.int8
    quantize_(linear, Int8WeightOnlyConfig() if integers else Float8WeightOnlyConfig(weight_dtype=tensors[0].dtype))
    return _read_affine(linear.weight, type(linear.weight).__name__)
