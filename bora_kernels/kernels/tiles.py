"""Which tiles of a base product fill a Hopper GPU: a model of waves, fitted to measured times.

A product of T tiles on P multiprocessors, each with room for one program, takes W = ⌈T/P⌉ waves:

    microseconds  =  start + W·(wave + steps·step)

where a tile of C columns has C/BLOCK_SIZE_C + 1 steps, the last of them for the low-rank product. With room for two
programs, W is ⌈T/2P⌉, and a last wave of at most P tiles costs ``alone`` for each step. The constants are those of
some 120 products for each tile, in both orientations, on an H100 (``benchmarks/notes/2026-11-28.md``); half of all
products are within 2 to 4 % of the model.

A large tile does most for each byte that it loads, and wastes most in a last wave that is not full. So a product may
be made in two parts: whole waves of large tiles, and what is left of them in smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class Tile(NamedTuple):
    m: int
    o: int
    c: int  # columns that a step takes
    warps: int
    stages: int
    stores: int  # pieces of o that it leaves the kernel in
    resident: int  # programs that a multiprocessor has room for
    start: float
    wave: float
    step: float
    alone: float  # a step where a multiprocessor has one program

    def waves(self, tiles: int, processors: int) -> tuple[int, int]:
        """Waves in which every multiprocessor may have all its programs, and those (one or none) in which one."""
        whole, left = divmod(tiles, self.resident * processors)
        few = 0 < left <= processors * (self.resident - 1)
        return whole + (left > 0 and not few), int(few)

    def time(self, tiles: int, C: int, processors: int) -> float:
        whole, few = self.waves(tiles, processors)
        steps = C / self.c + 64 / self.c
        return self.start + whole * (self.wave + steps * self.step) + few * (self.wave + steps * self.alone)


LARGE = Tile(128, 256, 64, 8, 4, 2, 1, 2.7, 2.5, 0.653, 0.653)
PAIRED = Tile(128, 128, 64, 4, 3, 2, 2, 0.0, 2.6, 0.714, 0.558)
SQUARE = Tile(128, 128, 64, 4, 4, 1, 1, 2.7, 1.1, 0.376, 0.376)
FLAT = Tile(64, 256, 64, 4, 4, 2, 1, 2.5, 1.2, 0.377, 0.377)
SMALL = Tile(64, 128, 128, 4, 4, 1, 1, 0.0, 1.0, 0.511, 0.511)
TILES = (LARGE, PAIRED, SQUARE, FLAT, SMALL)
SECOND_LAUNCH = 1.0  # microseconds between two parts
WORTH = 0.97  # two parts are taken where they are expected to save more


class Part(NamedTuple):
    """Tiles ``first`` to ``last`` of the product, each made as ``over`` tiles along m times along o."""

    tile: Tile
    over: tuple[int, int]
    first: int
    last: int

    @property
    def tiles(self) -> int:
        return (self.last - self.first) * self.over[0] * self.over[1]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def expected_time(parts: tuple[Part, ...], C: int, processors: int) -> float:
    """What the model expects, in microseconds."""
    return sum(part.tile.time(part.tiles, C, processors) for part in parts) + SECOND_LAUNCH * (len(parts) - 1)


def in_one_part(M: int, O: int) -> Iterator[tuple[Part, ...]]:
    for tile in TILES:
        yield (Part(tile, (1, 1), 0, cdiv(M, tile.m) * cdiv(O, tile.o)),)


def in_two_parts(M: int, O: int, processors: int) -> Iterator[tuple[Part, ...]]:
    """As many whole waves as there are, or one fewer, and the rest in tiles that a large one is made of."""
    for tile in (LARGE, PAIRED):
        tiles, slots = cdiv(M, tile.m) * cdiv(O, tile.o), tile.resident * processors
        for whole in (tiles // slots * slots, (tiles // slots - 1) * slots):
            for small in TILES:
                over = tile.m // small.m, tile.o // small.o
                if 0 < whole < tiles and over[0] * over[1] > 1:
                    yield Part(tile, (1, 1), 0, whole), Part(small, over, whole, tiles)


@lru_cache
def parts_of_product(M: int, O: int, C: int, processors: int) -> tuple[Part, ...]:
    """The fastest, by the model, of all that ``in_one_part`` and ``in_two_parts`` have."""

    def expected(parts: tuple[Part, ...]) -> float:
        return expected_time(parts, C, processors)

    one = min(in_one_part(M, O), key=expected)
    two = min(in_two_parts(M, O, processors), key=expected, default=one)
    return two if expected(two) < WORTH * expected(one) else one
