"""Block sizes, warps and pipeline stages: plain functions of sizes, dtype and architecture.

There is no autotuning: a first call compiles one variant of each kernel. The numbers for half precision were measured
on an H100 (``benchmarks/NOTES.md``); every configuration is compiled for all supported targets in the tests. To change
one, see CONTRIBUTING.md.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from .tiles import Part, parts_of_product

H100_MEMORY_RATE = 3.35  # TB/s; what the numbers were measured with
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@lru_cache
def target(device_index: int) -> tuple[int | str, int]:
    """Architecture (80, 90, ... or "gfx942") and number of multiprocessors; (0, 4) for Triton's interpreter."""
    if device_index < 0 or knobs.runtime.interpret:
        return 0, 4
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return properties.major * 10 + properties.minor, properties.multi_processor_count


@lru_cache
def memory_rate(device_index: int) -> float:
    """TB/s of the device's memory by its clock and width: 3.35 for an H100, 4.9 for an H200; an H100's if unknown."""
    if device_index < 0 or knobs.runtime.interpret:
        return H100_MEMORY_RATE
    properties = torch.cuda.get_device_properties(device_index)
    return properties.memory_clock_rate * properties.memory_bus_width * 2 / 8e9 or H100_MEMORY_RATE


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def is_half(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2


def is_aligned(matrix: Tensor) -> bool:
    """Whether rows (or columns) start at multiples of 16 bytes, so that a tile is loaded in 16-byte pieces."""
    stride = max(matrix.stride())
    return 1 in matrix.stride() and stride * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


def is_packed(factor: Tensor) -> bool:
    """Whether a factor [.., R] is stored in rows of R: a stride that kernels know as a constant, with its alignment."""
    return factor.stride() == (factor.shape[1], 1)


def rank_block(R: int, dtype: torch.dtype) -> int:
    """Ranks in a tile: a power of two of at least 16; float32 products run on ordinary units and hold fewer."""
    return min(64 if is_half(dtype) else 16, max(16, 1 << (R - 1).bit_length()))


def has_room(arch: int | str, aligned: bool) -> bool:
    """Whether large tiles fit: shared memory for them, and loads in few registers."""
    return aligned and arch in (90, 100, 103)


def finish_config(arch: int | str, R: int, dtype: torch.dtype) -> dict:
    block_r = rank_block(R, dtype)
    few = R <= 64 and not (block_r == 64 and arch in (100, 103))  # there Triton 3.9 spills with 4 warps
    if isinstance(arch, str) and R > 256:  # Triton 3.9 spills for AMD
        block_r = 32
    return {"BLOCK_SIZE_I": 32, "BLOCK_SIZE_R": block_r, "num_warps": 4 if few else 8}


def gram_config() -> dict:
    return {"BLOCK_SIZE": 512, "num_warps": 4}


def project_tile(arch: int | str, R: int, dtype: torch.dtype, aligned: bool, dropout: bool) -> dict:
    block_r = rank_block(R, dtype)
    if not is_half(dtype):
        block_m, block_c, warps, stages = 32, 32, 4, 2
    elif not has_room(arch, aligned):
        block_m, block_c, warps, stages = 32, 64, 4, 2
    elif dropout:
        block_m, block_c, warps, stages = 64, 128, 8, 3
    elif block_r <= 32:
        block_m, block_c, warps, stages = 64, 128, 4, 4
    elif R <= 64:
        block_m, block_c, warps, stages = 64, 64, 4, 3
    else:
        block_m, block_c, warps, stages = 128, 64, 8, 2
    return {
        "BLOCK_SIZE_M": block_m, "BLOCK_SIZE_C": block_c, "BLOCK_SIZE_R": block_r,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def splits_that_fill(blocks: int, steps: int, slots: int, overhead: float, most: int) -> int:
    """Into how many splits to cut the steps of each of ``blocks``: the fewest of those that take the least time.

    Programs run in waves of ``slots``, and each takes its steps and an overhead, in steps.
    """

    def time(splits: int) -> float:
        return cdiv(blocks * splits, slots) * (cdiv(steps, splits) + overhead)

    return min(range(1, max(1, min(steps, most)) + 1), key=time)


@lru_cache
def project_config(
    arch: int | str, processors: int, M: int, C: int, R: int, dtype: torch.dtype, aligned: bool, dropout: bool
) -> tuple[int, dict]:
    """Parts of the columns, and the configuration."""
    config, groups = project_tile(arch, R, dtype, aligned, dropout), cdiv(R, rank_block(R, dtype))
    if config["BLOCK_SIZE_M"] == 128 and 3 * cdiv(M, 128) * groups < 2 * processors:
        config |= {"BLOCK_SIZE_M": 64, "num_warps": 4, "num_stages": 3}
    resident = {32: 4, 64: 2 if dropout or R <= 32 else 3, 128: 1}[config["BLOCK_SIZE_M"]]
    blocks, slots = cdiv(M, config["BLOCK_SIZE_M"]) * groups, resident * processors if arch != 0 else 4
    # where a third of the device is filled anyway, memory is busy, and every part is bytes
    most = 16 if 3 * blocks <= slots else slots // blocks
    return splits_that_fill(blocks, cdiv(C, config["BLOCK_SIZE_C"]), slots, 0.5, most), config


@lru_cache
def reduce_config(
    arch: int | str, processors: int, M: int, C: int, R: int, dtype: torch.dtype, aligned: bool, dropout: bool
) -> tuple[int, dict]:
    """Splits of the tokens, and the configuration."""
    block_r = rank_block(R, dtype)
    if not is_half(dtype) or dropout:
        block_m, block_c, stages = 32, 64, 2
    elif has_room(arch, aligned):
        if R <= 32 or (R <= 64 and cdiv(C, 64) <= processors):
            block_m, block_c, stages = 64, 64, 4 if block_r <= 32 else 3
        else:
            block_m, block_c, stages = 32, 128, 3
    else:
        block_m, block_c, stages = 32 if isinstance(arch, str) else 64, 64, 2  # AMD has 64 KiB of shared memory
    blocks, slots = cdiv(C, block_c) * cdiv(R, block_r), 3 * processors if arch != 0 else 4
    splits = splits_that_fill(blocks, cdiv(M, block_m), slots, 8, 16)
    return splits, {
        "BLOCK_SIZE_M": block_m, "BLOCK_SIZE_C": block_c, "BLOCK_SIZE_R": block_r,
        "num_warps": 4, "num_stages": stages,
    }  # fmt: skip


def gate_config() -> dict:
    return {"BLOCK_SIZE": 2048, "num_warps": 8}


RMS_NORM_COLUMNS = 16384  # of which a tile holds whole rows


def rms_norm_config(K: int) -> dict:
    """Whole rows, 16 elements a thread: several where they are short, as those of attention heads."""
    block_k = max(16, 1 << (K - 1).bit_length())
    block_m = max(1, 2048 // block_k)
    return {
        "BLOCK_SIZE_M": block_m, "BLOCK_SIZE_K": block_k,
        "num_warps": min(16, max(4, block_m * block_k // 512)),
    }  # fmt: skip


def combine_config(R: int) -> dict:
    return {"BLOCK_SIZE_C": 32, "BLOCK_SIZE_R": min(64, 1 << (R - 1).bit_length()), "num_warps": 4}


@lru_cache
def gemm_config(
    M: int, O: int, C: int, dtype: torch.dtype, device_index: int, descriptors_fit: bool, aligned: bool, dropout: bool
) -> tuple[tuple[tuple[int], dict], ...]:
    """Grid and configuration of each launch; USE_DESCRIPTORS says whether operands come through TMA.

    The launch that takes longest comes last.
    """
    arch, processors = target(device_index)
    if arch == 90 and descriptors_fit and is_half(dtype) and not dropout and M > 64:
        return tuple(
            ((min(part.tiles, part.tile.resident * processors),), config_of_part(part))
            for part in reversed(parts_of_product(M, O, C, processors))
        )
    config = gemm_tile(arch, processors, M, O, dtype, descriptors_fit, aligned, dropout)
    tiles = cdiv(M, config["BLOCK_SIZE_M"]) * cdiv(O, config["BLOCK_SIZE_O"])
    resident = 1 if config["USE_DESCRIPTORS"] else 2
    every = {"first_tile": 0, "num_tiles": tiles, "OVER_M": 1, "OVER_O": 1}
    return (((min(tiles, resident * processors),), config | every),)


def config_of_part(part: Part) -> dict:
    tile = part.tile
    return {
        "BLOCK_SIZE_M": tile.m, "BLOCK_SIZE_O": tile.o, "BLOCK_SIZE_C": tile.c, "BLOCK_SIZE_R": 16, "GROUP_SIZE_M": 8,
        "STORES": tile.stores, "USE_DESCRIPTORS": True, "num_warps": tile.warps, "num_stages": tile.stages,
        "first_tile": part.first, "num_tiles": part.last - part.first, "OVER_M": part.over[0], "OVER_O": part.over[1],
    }  # fmt: skip


def gemm_tile(
    arch: int | str,
    processors: int,
    M: int,
    O: int,
    dtype: torch.dtype,
    descriptors_fit: bool,
    aligned: bool,
    dropout: bool,
) -> dict:
    """The tile of the base product for one target."""

    def tile(m: int, o: int, c: int, warps: int, stages: int, descriptors: bool = False, stores: int = 1) -> dict:
        return {
            "BLOCK_SIZE_M": m, "BLOCK_SIZE_O": o, "BLOCK_SIZE_C": c, "BLOCK_SIZE_R": 16, "GROUP_SIZE_M": 8,
            "STORES": stores, "USE_DESCRIPTORS": descriptors, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip

    def fills_device(m: int, o: int) -> bool:
        return cdiv(M, m) * cdiv(O, o) >= processors

    if arch == 0:  # the interpreter's cost is by program, so tiles are big; descriptors are right there in float32 only
        return tile(64, 128, 64, 4, 1, descriptors_fit and dtype == torch.float32)
    if dtype == torch.float32:
        large = aligned and not dropout and 2 * cdiv(M, 128) * cdiv(O, 128) >= processors
        return tile(128, 128, 16, 8, 2) if large else tile(64, 64, 16, 4 if aligned else 8, 2)
    if arch in (90, 100, 103) and descriptors_fit:
        if fills_device(128, 256) and not dropout:
            return tile(128, 256, 64, 8, 4, True, stores=2)
        return tile(128, 128, 64, 8, 4, True) if M > 64 and not dropout else tile(64, 128, 64, 8, 4, True)
    if isinstance(arch, str):
        return tile(128, 128, 32, 8, 2)
    if aligned and not dropout and fills_device(128, 128):
        return tile(128, 128, 64, 8, 3) if arch in (80, 90, 100, 103) else tile(128, 128, 32, 8, 3)
    return tile(64, 64, 32, 8, 3)


def gemm_of_v_config() -> dict:
    block = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_O": 64, "BLOCK_SIZE_C": 16, "BLOCK_SIZE_R": 16}
    return {**block, "num_warps": 8, "num_stages": 1}  # rare: few registers


def weight_or_v_config() -> dict:
    """Tiles of a copy; the product with its ranks is rare."""
    return {"BLOCK_SIZE_N": 16, "BLOCK_SIZE_C": 128, "BLOCK_SIZE_R": 16, "num_warps": 4, "num_stages": 1}


def split_config(R: int) -> dict:
    block_r = min(64, 1 << (R - 1).bit_length())
    return {"BLOCK_SIZE": max(8, 256 // block_r), "BLOCK_SIZE_R": block_r, "num_warps": 4}


def dequantize_config(block: int) -> dict:
    """Blocks of 4-bit elements that a program decodes: 4096 elements, 32 a thread."""
    return {"BLOCKS": max(1, 4096 // block), "num_warps": 4}
