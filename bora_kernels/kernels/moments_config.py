"""Block sizes of the norms' reads of W0, and how many programs share one: see ``config``."""

from __future__ import annotations

from functools import lru_cache

import torch

from .config import H100_MEMORY_RATE, cdiv, has_room, is_half, rank_block, splits_that_fill


@lru_cache
def moments_config(
    arch: int | str, processors: int, I: int, J: int, R: int, dtype: torch.dtype, aligned: bool, transposed: bool,
    squares: bool, rate: float = H100_MEMORY_RATE,
) -> tuple[int, dict]:  # fmt: skip
    """Splits of the axis summed over, and the configuration."""
    # Triton knows of a size whether it is a multiple of 16: if not, a row's end masks single elements
    aligned = aligned and (I if transposed else J) % 16 == 0
    block_r, warps, resident, filling = rank_block(R, dtype), 4, 4, 4.0
    if not is_half(dtype):
        block_i, block_j, stages = 32, 32, 3
    elif has_room(arch, aligned) and dtype == torch.bfloat16:
        stages, resident, filling = 3, 2, 2.0
        if block_r == 64:
            block_i, block_j = 128, 64
            if R > 64:
                block_r, warps = 128, 8
        elif I * J < (5 if transposed and squares else 1.5) * processors * 128 * 128:  # not enough tiles of the larger
            block_i, block_j, resident, filling = 64, 64, 3, 1.6
        elif transposed and block_r == 16 and squares:
            block_i, block_j, filling = 128, 128, 0.8
        else:  # the larger one spills, or without squares keeps a third tile, so that one program fits
            block_i, block_j, resident, filling = 128, 64, 3, 1.2
    else:
        # more spill: for 100 the two terms of the factor, for 90 bfloat16 that is loaded in single elements
        widest = 0 if arch in (100, 103) else 16 if arch == 90 and dtype == torch.bfloat16 else 32
        wide = block_r <= widest
        block_i, block_j, stages = 32, 64 if wide else 32, 2
    block_g = min(64, block_r) if dtype == torch.bfloat16 else 16  # others multiply in float32, on ordinary units
    blocks = (cdiv(R, block_g) + cdiv(I, block_i)) * cdiv(R, block_r)
    vector = 16 // dtype.itemsize
    added = 1 if not aligned else block_i * block_j // (32 * warps * vector) if transposed else vector
    faster, tile = max(1.0, rate / H100_MEMORY_RATE), block_i * block_j * dtype.itemsize
    splits = moments_splits(processors, resident, filling, blocks, cdiv(J, block_j), tile, 2 * 4 * I * R, faster)
    return splits, {
        "BLOCK_SIZE_I": block_i, "BLOCK_SIZE_J": block_j, "BLOCK_SIZE_R": block_r, "BLOCK_SIZE_G": block_g,
        "STAGES": stages, "ADDED": added, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def moments_splits(
    processors: int, resident: int, filling: float, blocks: int, steps: int, tile: int, part: int, faster: float = 1.0
) -> int:
    """Into how many programs the steps of each of these blocks are split: the least time by a model of what they load.

    Programs run in waves of ``resident`` a multiprocessor and take ``steps`` tiles each, all at the rate of memory. A
    last wave of fewer than ``filling`` programs a multiprocessor does not reach that rate, and one that gives some
    multiprocessors a program more than others loses a third of what the others lack. A wave begins in the time of
    42 KB a multiprocessor, and each split writes a part that is read again. Memory that is so many times
    ``faster`` than an H100's takes so many times the programs, and an idle one loses as much more. (Measured:
    ``benchmarks/NOTES.md``.)
    """

    def time(splits: int) -> float:
        size = cdiv(steps, splits)
        waves, last = divmod(blocks * cdiv(steps, size), resident * processors)
        programs = float(waves * resident * processors)
        if last:
            programs += max(filling * faster * processors, last + 0.35 * faster * (-last % processors))
        return size * tile * programs + 42e3 * processors * (waves + (last > 0)) + splits * part

    best = min(range(1, min(16, cdiv(steps, 4)) + 1), key=time)  # four tiles at least: loads run ahead
    return cdiv(steps, cdiv(steps, best))  # so that none has nothing to do


def factor_terms_config() -> dict:
    return {"BLOCK_SIZE_J": 32, "BLOCK_SIZE_R": 64, "num_warps": 4}


@lru_cache
def gram_of_terms_config(arch: int | str, processors: int, J: int, R: int) -> tuple[int, dict]:
    """Splits of the Gram matrix, and the configuration: sums over 512 at most, of which tensor cores lose little."""
    blocks, steps = cdiv(R, 64), cdiv(J, 64)
    splits = max(cdiv(steps, 8), min(cdiv(steps, 2), 16, processors // (blocks * (blocks + 1) // 2)))
    return cdiv(steps, cdiv(steps, splits)), {
        "BLOCK_SIZE_J": 64, "BLOCK_SIZE_R": 64, "USE_DESCRIPTORS": arch != 0, "num_warps": 4, "num_stages": 4,
    }  # fmt: skip


@lru_cache
def moments_of_terms_config(
    arch: int | str, processors: int, I: int, J: int, R: int, transposed: bool
) -> tuple[int, dict]:
    """Splits of the axis summed over, and the configuration: W0 is read once for up to 256 ranks.

    Both terms stand side by side where an accumulator has room for them. A wave begins and ends in the time of five
    steps. (Measured: ``benchmarks/NOTES.md``.)
    """
    joined, block_r = R <= 128, 128 if R <= 128 else 256
    block_i, block_j, warps = 128, 64, 8
    blocks, steps = cdiv(I, block_i) * cdiv(R, block_r), cdiv(J, block_j)
    splits = splits_that_fill(blocks, steps, processors, 5, 16)
    square_columns = block_j if joined else block_j // 2  # of a step
    return cdiv(steps, cdiv(steps, splits)), {
        "BLOCK_SIZE_I": block_i, "BLOCK_SIZE_J": block_j, "BLOCK_SIZE_R": block_r, "JOINED": joined,
        "ADDED": square_columns * block_i // (256 * warps) if transposed else 8,
        "USE_DESCRIPTORS": arch != 0, "num_warps": warps, "num_stages": 4,
    }  # fmt: skip


def products_config(R: int) -> dict:
    """Tiles of P·G: rows that are not aligned are loaded in single elements, which takes more registers."""
    return {
        "BLOCK_SIZE_I": 64, "BLOCK_SIZE_R": 64, "BLOCK_SIZE_Q": 64,
        "num_warps": 4 if R % 4 == 0 else 8, "num_stages": 1,
    }  # fmt: skip
