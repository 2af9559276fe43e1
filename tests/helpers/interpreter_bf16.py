"""Make bfloat16 right, or loud, in Triton's interpreter.

The interpreter stores a bfloat16 value as its 16 raw bits and computes on those bits: dots, sums and
comparisons are wrong without a word, and float32 is truncated on its way to bfloat16. ``activate()`` changes
that:

* casts to bfloat16 round to nearest even (toward zero if the kernel asks for "rtz"), casts from it are exact;
* ``tl.dot`` multiplies the bfloat16 values and accumulates in float32, like the hardware;
* loads, stores, reshapes and other moves of bits stay as they are;
* anything else that meets a bfloat16 operand raises (as ``triton.runtime.errors.InterpreterError``): a kernel
  should upcast first.

It replaces private parts of Triton, so it serves only the versions that it was tested with.
"""

from __future__ import annotations

import functools
from importlib import metadata

import numpy as np

SUPPORTED_VERSIONS = ((3, 6), (3, 9))  # first and last, as (major, minor)

# Builder methods that move or reinterpret bits, or that cast: every other method refuses bfloat16 operands.
_BIT_MOVES = {
    "create_load",
    "create_store",
    "create_masked_load",
    "create_masked_store",
    "create_tensor_pointer_load",
    "create_tensor_pointer_store",
    "create_descriptor_load",
    "create_descriptor_store",
    "create_descriptor_gather",
    "create_descriptor_scatter",
    "create_broadcast",
    "create_splat",
    "create_unsplat",
    "create_expand_dims",
    "create_reshape",
    "create_trans",
    "create_cat",
    "create_join",
    "create_split",
    "create_gather",
    "create_select",
    "create_bitcast",
    "create_fabs",  # clears the sign bit
    "create_print",
}
_CASTS = {
    "create_fp_ext",
    "create_fp_trunc",
    "create_fp_to_fp",
    "create_fp_to_si",
    "create_fp_to_ui",
    "create_si_to_fp",
    "create_ui_to_fp",
}


def unsupported_reason() -> str | None:
    """Why ``activate()`` cannot serve the installed Triton, or None if it can."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "triton is not installed"
    first, last = SUPPORTED_VERSIONS
    if first <= tuple(int(part) for part in version.split(".")[:2]) <= last:
        return None
    return (
        f"bfloat16 in the interpreter of triton {version} is unverified (verified: "
        f"{first[0]}.{first[1]} to {last[0]}.{last[1]})"
    )


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16)."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray, *, toward_zero: bool = False) -> np.ndarray:
    """The bfloat16 bits (uint16) of float32 values, rounded to nearest even or toward zero; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    if not toward_zero:
        # A carry out of the mantissa is right, up to infinity; only the bits of a NaN would wrap around.
        bits = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    return np.where(np.isnan(values), np.uint16(0x7FC0), (bits >> 16).astype(np.uint16))


def activate() -> None:
    """Patch the interpreter of this process; calling it again changes nothing."""
    if reason := unsupported_reason():
        raise RuntimeError(reason)
    import triton.language as tl
    from triton.runtime import interpreter

    Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(Builder, "bf16_is_honest", False):
        return

    def is_bf16(value) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(is_bf16, value))
        return isinstance(value, Handle) and value.dtype.scalar.name == tl.bfloat16.name

    def widened(handle):
        return Handle(bf16_to_fp32(handle.data), tl.float32) if is_bf16(handle) else handle

    plain_cast, plain_fp_to_fp, plain_dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    def cast(plain, self, src, dst_type, *rounding):
        """``plain`` between any two types by way of float32 where one of them is bfloat16."""
        dst = dst_type.scalar
        if src.dtype.scalar == dst or tl.bfloat16 not in (src.dtype.scalar, dst):
            return plain(self, src, dst_type, *rounding)
        src = widened(src)
        if dst == tl.bfloat16:
            if src.dtype.scalar.primitive_bitwidth == 8 and src.dtype.scalar.is_floating():
                src = plain(self, src, tl.float32, *rounding)  # float8 is stored as bits too
            bits = fp32_to_bf16(src.data.astype(np.float32), toward_zero=toward_zero in rounding)
            return Handle(bits, tl.bfloat16)
        return src if dst == tl.float32 else plain(self, src, dst_type, *rounding)

    def cast_impl(self, src, dst_type):
        return cast(plain_cast, self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast(plain_fp_to_fp, self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, acc, *options):
        if is_bf16(acc):
            raise TypeError("bfloat16 accumulator in Triton's interpreter: accumulate in float32")
        return plain_dot(self, widened(a), widened(b), acc, *options)

    def get_bf16(self, value):
        return Handle(fp32_to_bf16(np.array([value], np.float32)), tl.bfloat16)

    def refusing_bf16(name, method):
        @functools.wraps(method)
        def checked(self, *args, **kwargs):
            if any(map(is_bf16, args)) or any(map(is_bf16, kwargs.values())):
                raise TypeError(f"bfloat16 operand of {name} in Triton's interpreter: upcast to float32 first")
            return method(self, *args, **kwargs)

        return checked

    for name in [name for name in dir(Builder) if name.startswith("create_")]:
        if name not in _BIT_MOVES | _CASTS:
            setattr(Builder, name, refusing_bf16(name, getattr(Builder, name)))
    Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    Builder.get_bf16 = get_bf16

    # Reductions and scans do not go through the builder.
    Reduction = interpreter.ReduceScanOpInterface
    plain_check = Reduction.check_tensor

    def check_tensor(self, inputs):
        if any(is_bf16(value.handle) for value in inputs if isinstance(value, tl.tensor)):
            raise TypeError("bfloat16 reduction or scan in Triton's interpreter: upcast to float32 first")
        plain_check(self, inputs)

    Reduction.check_tensor = check_tensor
    Builder.bf16_is_honest = True
