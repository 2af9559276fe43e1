"""Which calls take the passes of ``wide``, and in which tiles: see ``config``."""

from __future__ import annotations

from functools import lru_cache

import torch

from .config import cdiv, is_half, splits_that_fill


def has_wide(arch: int | str, R: int, dtype: torch.dtype, fits: bool, dropout: bool) -> bool:
    """Whether there are such passes: half precision on Hopper, of a t that ``fits`` a descriptor; 0 stands for it."""
    return arch in (0, 90) and is_half(dtype) and fits and not dropout and R > 16


@lru_cache
def project_wide_config(arch: int | str, processors: int, M: int, C: int, R: int) -> tuple[int, dict]:
    """Parts of the columns, and the configuration."""
    steps, options = cdiv(C, 64), []
    # rows, ranks, warps, programs that a multiprocessor holds, and how long a step takes beside one of 128 rows
    few = ((64, 32, 4, 3, 1.0),) if R <= 32 else ((64, 64, 4, 2, 1.0),)
    for block_m, block_r, warps, resident, step in few if R <= 64 else ((128, 128, 8, 1, 1.0), (64, 128, 4, 1, 0.6)):
        blocks, slots = cdiv(M, block_m) * cdiv(R, block_r), resident * processors
        parts = splits_that_fill(blocks, steps, slots, 4, 16)
        time = cdiv(blocks * parts, slots) * (cdiv(steps, parts) + 4) * step
        options.append((time, parts, block_m, block_r, warps))
    _, parts, block_m, block_r, warps = min(options)
    return parts, {
        "BLOCK_SIZE_M": block_m, "BLOCK_SIZE_C": 64, "BLOCK_SIZE_R": block_r,
        "USE_DESCRIPTORS": arch != 0, "num_warps": warps, "num_stages": 4,
    }  # fmt: skip


@lru_cache
def reduce_wide_config(arch: int | str, processors: int, M: int, C: int, R: int) -> tuple[int, dict] | None:
    """Splits of the tokens, and the configuration; None where the general pass is as fast."""
    if R <= 32 or (R <= 64 and M < 2048):
        return None
    block_c, block_r, warps, stages, resident = 128, 128, 8, 3, 2
    if R <= 64:
        block_r, stages = 64, 4
    elif M < 1024:
        block_c, warps, resident = 64, 4, 3
    elif R > 128 and cdiv(R, 128) % 2 == 0:
        block_r, resident = 256, 1
    blocks = cdiv(C, block_c) * cdiv(R, block_r)
    return splits_that_fill(blocks, cdiv(M, 64), resident * processors, 8, 16), {
        "BLOCK_SIZE_M": 64, "BLOCK_SIZE_C": block_c, "BLOCK_SIZE_R": block_r,
        "ADDED": 64 * block_c // (256 * warps),
        "USE_DESCRIPTORS": arch != 0, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
