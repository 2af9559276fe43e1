"""Tiles of the passes that make sums for several layers of a block: see ``config``."""

from __future__ import annotations

from functools import lru_cache

import torch

from .config import cdiv, has_room, is_half, splits_that_fill


def joint_rank(dtype: torch.dtype) -> int:
    """The largest rank for which sums of three layers keep their accumulators in registers."""
    return 64 if is_half(dtype) else 32


@lru_cache
def gate_sums_config(
    arch: int | str, processors: int, M: int, C: int, R: int, dtype: torch.dtype, aligned: bool
) -> tuple[int, dict]:
    """Splits of the tokens, and the configuration."""
    block_r, warps, resident = max(16, 1 << (R - 1).bit_length()), 8, 1
    if not is_half(dtype):
        block_m, block_c, stages = 32, 32, 1
    elif has_room(arch, aligned) and block_r == 32:
        block_m, block_c, warps, stages, resident = 16, 32, 2, 3, 4
    elif has_room(arch, aligned):
        block_m, block_c, warps, stages, resident = 16, 64, 4, 3, 3 if block_r == 16 else 2
    else:
        block_m, block_c, stages = 32, 64, 2
    slots = resident * processors if arch != 0 else 4
    splits = splits_that_fill(cdiv(C, block_c), cdiv(M, block_m), slots, 6, 32)
    return splits, _tile(block_m, block_c, block_r, warps, stages)


@lru_cache
def shared_sums_config(
    arch: int | str, processors: int, M: int, C: int, R: int, dtype: torch.dtype, aligned: bool, layers: int
) -> tuple[int, dict]:
    """Splits of the tokens, and the configuration."""
    block_r, stages = max(16, 1 << (R - 1).bit_length()), 3
    if not is_half(dtype):
        block_m, block_c, warps, stages, resident = 32, 32, 8, 1, 1
    elif not has_room(arch, aligned):
        block_m, block_c, warps, stages, resident = 32, 64, 8, 2, 1
    elif layers == 2 and block_r <= 32:
        block_m, block_c, warps, resident = 32, 64, 4, 4
    elif layers == 2 or block_r == 32:
        block_m, block_c, warps, resident = 16, 128, 4, 2
    elif block_r == 16 and arch == 90 and R % 4 == 0:  # else it spills: rows of v that are loaded in single elements
        block_m, block_c, warps, resident = 64, 64, 4, 2
    elif block_r == 16:
        block_m, block_c, warps, resident = 32, 64, 4, 3
    else:
        block_m, block_c, warps, resident = 32, 128, 8, 1 if min(M, C) >= 1024 else 2
    slots = resident * processors if arch != 0 else 4
    splits = splits_that_fill(cdiv(C, block_c), cdiv(M, block_m), slots, 6, 32)
    return splits, _tile(block_m, block_c, block_r, warps, stages)


def _tile(block_m: int, block_c: int, block_r: int, warps: int, stages: int) -> dict:
    return {
        "BLOCK_SIZE_M": block_m, "BLOCK_SIZE_C": block_c, "BLOCK_SIZE_R": block_r,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
