"""Launch configurations of mixed batches, by tokens, sizes and multiprocessors, as measured on an H100."""

from __future__ import annotations

from functools import lru_cache

import torch

from .config import cdiv, gemm_tile, has_room, is_half, project_tile, rank_block, target


def mixed_few(arch: int | str, M: int) -> bool:
    """Whether a mixed batch has so few tokens that reading W0 takes longer than multiplying by it."""
    return M <= (32 if arch == 0 else 64)  # the interpreter's cost is by program


def mixed_overlap(arch: int | str, M: int, N: int) -> bool:
    """Whether a launch for few tokens may begin while the one before it runs: programmatic dependent launch."""
    return arch == 90 and (M > 16 or N <= 2048)  # elsewhere it takes as long as it saves


@lru_cache
def mixed_project_few_config(M: int, K: int, R: int, factor_dtype: torch.dtype) -> tuple[int, dict]:
    """Splits of K, and the configuration: one token a program, so that each has its own adapter."""
    block_r = min(64, 1 << (R - 1).bit_length())
    elements = 32768 if 32 < M and block_r == 16 and is_half(factor_dtype) else 16384 if block_r <= 32 else 8192
    block_c = min(2048 if M > 32 else 1024, elements // block_r)
    return max(1, min(cdiv(K, block_c), 8)), {
        "BLOCK_SIZE_C": block_c, "BLOCK_SIZE_R": block_r, "num_warps": 8, "num_stages": 2,
    }  # fmt: skip


@lru_cache
def mixed_few_config(
    arch: int | str, processors: int, M: int, N: int, K: int, dtype: torch.dtype, descriptors_fit: bool, wide: bool
) -> tuple[int, dict]:
    """Splits of K, and the configuration; USE_DESCRIPTORS says whether operands come through TMA.

    ``wide`` says that factors meet u as two terms, which takes registers.
    """
    block_m = min(64, max(16, 1 << (M - 1).bit_length()))
    block_r = 64 if is_half(dtype) and not wide and not isinstance(arch, str) else 32
    per_processor, warps, descriptors = 2.0, 4, False
    if not is_half(dtype):
        block_n, block_c, warps, stages = 32, 32, 8 if block_m == 64 else 4, 2
    elif arch == 0:
        block_n, block_c, stages = 64, 64, 1
    elif block_m <= 32:
        block_n, block_c, stages = 32 if cdiv(N, 64) < processors else 64, 128, 4
    elif descriptors_fit and arch in (90, 100, 103):  # few programs, which keep many bytes on their way
        per_processor, block_n, warps, descriptors = 0.5, 128, 8, True
        block_c, stages = (64, 6) if cdiv(N, block_n) <= processors // 4 else (128, 4)
    else:
        block_n, block_c, warps, stages = 64, 64, 8, 4
    programs = cdiv(N, block_n) * cdiv(M, block_m)
    splits = max(1, min(int(per_processor * processors) // programs, cdiv(K, 4 * block_c), 8))
    return splits, {
        "BLOCK_SIZE_M": block_m, "BLOCK_SIZE_N": block_n, "BLOCK_SIZE_C": block_c, "BLOCK_SIZE_R": block_r,
        "USE_DESCRIPTORS": descriptors, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@lru_cache
def mixed_apart_config(
    arch: int | str,
    processors: int,
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    descriptors_fit: bool,
    wide: bool,
) -> tuple[int, dict] | None:
    """Splits of K and the configuration where a launch of its own adds what they make, or None: a program for each
    processor, which keeps many bytes on their way."""
    if not (descriptors_fit and is_half(dtype) and not wide and R <= 16 and arch in (0, 90)):
        return None
    if M <= (16 if arch == 0 else 32):
        return None
    block_n, block_c = 64, 32 if arch == 0 else 64
    splits = min(processors // (cdiv(N, block_n) * cdiv(M, 64)), cdiv(K, 4 * block_c), 8)
    if splits < 2:
        return None
    if splits == 2 and arch != 0:
        block_c = 128
    return splits, {
        "BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": block_n, "BLOCK_SIZE_C": block_c, "BLOCK_SIZE_R": 64, "RANKS": 16,
        "num_warps": 4, "num_stages": 1 if arch == 0 else 6,
    }  # fmt: skip


@lru_cache
def mixed_project_config(
    arch: int | str, processors: int, M: int, K: int, R: int, dtype: torch.dtype, aligned: bool
) -> tuple[int, dict]:
    """Splits of K, and the configuration: tiles of few tokens, each of which reads x once for each adapter in it."""
    config = project_tile(arch, R, dtype, aligned, False)
    if is_half(dtype) and arch != 0:
        block_m = 16 if M <= 512 else 32 if M <= 2048 else 64
        block_c = min(128 if block_m == 64 else 256, 4096 // config["BLOCK_SIZE_R"])
        if arch != 90 or not aligned:
            block_c = 64 if has_room(arch, aligned) else 32
        config |= {"BLOCK_SIZE_M": block_m, "BLOCK_SIZE_C": block_c, "num_warps": 4, "num_stages": 3}
    tiles, most = cdiv(M, config["BLOCK_SIZE_M"]), 2 if R > 16 else 4 if M >= 1024 else 8  # the product adds them
    return max(1, min(2 * processors // tiles, K // 512, most)), config


_TILES = ((128, 256, 8, 4, 2, 1.0), (128, 128, 8, 4, 1, 0.8), (64, 128, 4, 5, 1, 0.6))  # and a tile's part of the peak


@lru_cache
def mixed_many_config(
    M: int, N: int, R: int, dtype: torch.dtype, device_index: int, descriptors_fit: bool, aligned: bool, wide: bool
) -> tuple[tuple[int], dict]:
    """The grid, and the configuration; USE_DESCRIPTORS says whether operands come through TMA.

    Of the tiles that TMA fills the one whose rounds over the device take least. ``wide`` says that factors meet u as
    two terms, which takes registers, as a loop over ranks does.
    """
    arch, processors = target(device_index)
    config = gemm_tile(arch, processors, M, N, dtype, descriptors_fit, aligned, False)
    config["BLOCK_SIZE_N"] = config.pop("BLOCK_SIZE_O")

    def rounds(tile: tuple) -> float:
        m, n, *_, part = tile
        return cdiv(cdiv(M, m) * cdiv(N, n), processors) * m * n / part

    large = wide or R > 64
    tiles_that_fit = _TILES[2:] if large else _TILES[1:] if R > 16 else _TILES
    if config["USE_DESCRIPTORS"] and arch != 0:
        m, n, warps, stages, stores, _ = min(tiles_that_fit, key=rounds)
        config |= {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "STORES": stores, "num_warps": warps, "num_stages": stages}
        config["BLOCK_SIZE_R"] = 16 if large else rank_block(R, dtype)  # a loop over ranks takes registers
    elif large and arch != 0 and config["BLOCK_SIZE_M"] * config["BLOCK_SIZE_N"] > 64 * 128:
        config |= {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128}
    tiles = cdiv(M, config["BLOCK_SIZE_M"]) * cdiv(N, config["BLOCK_SIZE_N"])
    resident = 1 if config["USE_DESCRIPTORS"] else 2
    return (min(tiles, resident * processors),), config
