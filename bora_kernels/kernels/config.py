"""Block sizes, warps and pipeline stages: plain functions of sizes, dtype and architecture.

There is no autotuning: a first call compiles one variant of each kernel. To change a configuration, see
CONTRIBUTING.md; every one of these is compiled for all supported targets in the tests.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}



@lru_cache
def target(device_index: int | None) -> tuple[int | str, int]:
    """Architecture (80, 90, ... or "gfx942") and number of multiprocessors; (0, 4) under Triton's interpreter."""
    if device_index is None or not torch.cuda.is_available():
        return 0, 4
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def is_half(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2


def rank_block(R: int, dtype: torch.dtype) -> int:
    """Ranks in a tile: a power of two of at least 16; float32 products run on ordinary units and hold fewer."""
    return min(64 if is_half(dtype) else 16, max(16, 1 << (R - 1).bit_length()))


def moments_config(I: int, J: int, R: int, dtype: torch.dtype, contiguous: bool) -> tuple[int, dict]:
    """Splits of the axis summed over, and the configuration; ``contiguous`` says which axis of W0 has unit stride."""
    block_i, block_j = (64, 64) if is_half(dtype) else (32, 32)
    block_r = rank_block(R, dtype)
    programs = cdiv(I, block_i) * cdiv(R, block_r)
    splits = max(1, min(cdiv(J, 4 * block_j), cdiv(512, programs), 16))
    return splits, {
        "BLOCK_SIZE_I": block_i, "BLOCK_SIZE_J": block_j, "BLOCK_SIZE_R": block_r, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def finish_config(R: int) -> dict:
    return {"BLOCK_SIZE_I": 32, "BLOCK_SIZE_R": 16, "num_warps": 4}


def project_config(M: int, C: int, R: int, dtype: torch.dtype) -> dict:
    block_r = rank_block(R, dtype)
    block_c = 128 if is_half(dtype) and block_r <= 32 else 64 if is_half(dtype) else 32
    return {
        "BLOCK_SIZE_M": 32 if M <= 8192 else 64, "BLOCK_SIZE_C": block_c, "BLOCK_SIZE_R": block_r,
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def reduce_config(M: int, C: int, R: int, dtype: torch.dtype) -> tuple[int, dict]:
    """Splits of the tokens, and the configuration."""
    block_c, block_m = (64, 64) if is_half(dtype) else (64, 32)
    programs = cdiv(C, block_c) * cdiv(R, rank_block(R, dtype))
    splits = max(1, min(cdiv(M, 4 * block_m), cdiv(1024, programs), 32))
    return splits, {
        "BLOCK_SIZE_M": block_m, "BLOCK_SIZE_C": block_c, "BLOCK_SIZE_R": rank_block(R, dtype),
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def combine_config(R: int) -> dict:
    return {"BLOCK_SIZE_C": 32, "BLOCK_SIZE_R": min(64, 1 << (R - 1).bit_length()), "num_warps": 4}


def gemm_config(
    M: int, O: int, C: int, R: int, dtype: torch.dtype, device: torch.device, descriptors_fit: bool
) -> tuple[int, dict]:
    """Programs to launch, and the configuration; USE_DESCRIPTORS says whether operands come through TMA."""
    arch, processors = target(device.index if device.type == "cuda" else None)
    config = gemm_tile(arch, M, O, processors, dtype, descriptors_fit)
    tiles = cdiv(M, config["BLOCK_SIZE_M"]) * cdiv(O, config["BLOCK_SIZE_O"])
    resident = 1 if config["USE_DESCRIPTORS"] else 2
    return min(tiles, resident * processors), config | {"BLOCK_SIZE_R": 16}


def gemm_tile(
    arch: int | str, M: int, O: int, processors: int, dtype: torch.dtype, descriptors_fit: bool
) -> dict:
    """The tile of the base product for one target."""

    def tile(m, o, c, warps, stages, descriptors=False):
        return {
            "BLOCK_SIZE_M": m, "BLOCK_SIZE_O": o, "BLOCK_SIZE_C": c, "GROUP_SIZE_M": 8,
            "USE_DESCRIPTORS": descriptors, "FLATTEN": descriptors and arch == 90,
            "num_warps": warps, "num_stages": stages,
        }  # fmt: skip

    if arch == 0:  # the interpreter's cost is by program, so tiles are big; descriptors are right there in float32 only
        return tile(64, 128, 64, 4, 1, descriptors_fit and dtype == torch.float32)
    if dtype == torch.float32:
        return tile(64, 64, 32, 8, 2)
    if arch in (90, 100, 103) and descriptors_fit:
        if cdiv(M, 128) * cdiv(O, 256) >= processors:
            return tile(128, 256, 64, 8, 3, True)
        if cdiv(M, 128) * cdiv(O, 128) >= processors // 2:
            return tile(128, 128, 64, 8, 4, True)
        return tile(64, 128, 64, 4, 4, True)
    if isinstance(arch, str):
        return tile(128, 128, 32, 8, 2)
    if M <= 64 or cdiv(M, 128) * cdiv(O, 128) < processors // 2:
        return tile(64, 64, 64, 4, 3)
    return tile(128, 128, 64, 8, 3) if arch in (80, 90, 100, 103) else tile(128, 128, 32, 8, 3)
