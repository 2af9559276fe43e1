"""The 4-bit weights of bitsandbytes (NF4 and FP4), made dense for a moment.

The weight [N, K] is flat: element e = n·K + k is a half of byte e // 2, the high one for an even e.

    (a) W0[e] = code[half]·absmax[e // BLOCK]
    (b) absmax[b] = nested_code[stored[b]]·nested_absmax[b // NESTED_BLOCK] + offset        (double quantization)

``dequantize_nf4`` writes the dense weight with bitsandbytes' values. Kernels that stream W0 read that one: decoding in
each of them would take more instructions than it saves bytes (``benchmarks/NOTES.md``).

Source: QLoRA, arXiv 2305.14314, section 3.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import empty, launch
from ..replay.stage import stage
from .config import cdiv, dequantize_config


@triton.jit
def _load_absmax(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, NESTED_BLOCK: tl.constexpr):
    """absmax of the given blocks in float32; NESTED_BLOCK is 0, and the nested pointers None, where it is stored so."""
    absmax = tl.load(absmax_ptr + blocks, mask=mask, other=0)
    if NESTED_BLOCK != 0:  # (b)
        nested = tl.load(nested_absmax_ptr + blocks // NESTED_BLOCK, mask=mask, other=0.0)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + tl.load(offset_ptr)
    return absmax.to(tl.float32)


@triton.jit
def _dequantize_nf4_kernel(
    packed_ptr,  # [⌈E / 2⌉]
    code_ptr,  # [16]
    absmax_ptr,  # [⌈E / BLOCK⌉]
    nested_absmax_ptr,  # [⌈blocks / NESTED_BLOCK⌉] or None
    nested_code_ptr,  # [256] or None
    offset_ptr,  # [] or None
    out_ptr,  # [E]
    E,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Each program decodes BLOCKS consecutive blocks: absmax is read once for each."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offs_byte = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    offs_e = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    absmax = _load_absmax(
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, blocks * BLOCK < E, NESTED_BLOCK
    )[:, None]
    bytes = tl.load(packed_ptr + offs_byte, mask=2 * offs_byte < E, other=0).to(tl.int32)  # [BLOCKS, BLOCK / 2]
    even = tl.load(code_ptr + (bytes >> 4)) * absmax
    odd = tl.load(code_ptr + (bytes & 15)) * absmax  # (a)
    values = tl.interleave(even, odd)  # [BLOCKS, BLOCK]
    tl.store(out_ptr + offs_e, values.to(out_ptr.dtype.element_ty), mask=offs_e < E)


def dequantize_nf4(
    parts: Sequence[Tensor],
    shape: Sequence[int],
    block_size: Sequence[int],
    dtype: torch.dtype,
    prepared: object = None,
) -> Tensor:
    """The dense weight of ``shape`` in float32, bfloat16 or float16; parts and block_size as in ``quantized``.

    For ``prepared`` see ``replay.stage``.
    """
    tensors = (*parts, None, None, None)[:6]
    options = {"shape": tuple(shape), "block_size": tuple(block_size), "dtype": dtype}
    return _dequantize_nf4(*tensors, **options, prepared=prepared)[0]


@stage
def _dequantize_nf4(packed, code, absmax, nested_absmax, nested_code, offset, *, shape, block_size, dtype):
    out = empty(shape, dtype, packed.device)
    block, nested_block = (*block_size, 0)[:2]
    config = dequantize_config(block)
    launch(
        _dequantize_nf4_kernel,
        (cdiv(out.numel(), block * config["BLOCKS"]),),
        (packed, code, absmax, nested_absmax, nested_code, offset, out),
        E=out.numel(), BLOCK=block, NESTED_BLOCK=nested_block, **config,
        enable_fp_fusion=False,  # (b) rounds twice in bitsandbytes
    )  # fmt: skip
    return (out,)
