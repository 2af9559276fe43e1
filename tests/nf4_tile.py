"""A kernel that reads a weight in tiles through ``load_nf4``, as a kernel that streams W0 does."""

import triton
import triton.language as tl

from bora_kernels.kernels.nf4 import load_nf4


@triton.jit
def tile_kernel(
    packed_ptr, code_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    out_ptr,  # [I, J], contiguous
    I, J, stride_i, stride_j,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCK_SIZE_I: tl.constexpr, BLOCK_SIZE_J: tl.constexpr,
):  # fmt: skip
    offs_i = tl.program_id(0) * BLOCK_SIZE_I + tl.arange(0, BLOCK_SIZE_I)
    offs_j = tl.program_id(1) * BLOCK_SIZE_J + tl.arange(0, BLOCK_SIZE_J)
    tile = load_nf4(
        packed_ptr, code_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
        offs_i, offs_j, I, J, stride_i, stride_j, out_ptr.dtype.element_ty, BLOCK, NESTED_BLOCK,
    )  # fmt: skip
    ptrs = out_ptr + offs_i.to(tl.int64)[:, None] * J + offs_j[None, :]
    tl.store(ptrs, tile, mask=(offs_i < I)[:, None] & (offs_j < J)[None, :])
