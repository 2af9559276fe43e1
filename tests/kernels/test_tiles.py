"""Tiles of base products by a model of the device, over thousands of shapes."""

import random

import pytest

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.kernels.config import cdiv
from bora_kernels.kernels.tiles import FLAT, LARGE, PAIRED, SMALL, SQUARE, expected_time, in_one_part, parts_of_product

# microseconds on an H100 of 132 multiprocessors
MEASURED = {
    (1024, 4096, 4096): {LARGE: 46.9, PAIRED: 48.2, SQUARE: 54.1, FLAT: 56.2},
    (512, 4096, 4096): {SQUARE: 29.0, FLAT: 29.7, SMALL: 34.0},
    (1504, 4096, 4096): {LARGE: 91.4, PAIRED: 87.6, SQUARE: 79.6, FLAT: 82.6, SMALL: 104.4},
    (2048, 4096, 4096): {LARGE: 91.5, PAIRED: 95.3, SQUARE: 104.8, FLAT: 109.8},
    (8192, 4096, 4096): {LARGE: 362.1, PAIRED: 410.2, SQUARE: 435.7, FLAT: 451.0},
    (1008, 3584, 3584): {LARGE: 39.9, PAIRED: 41.2, SQUARE: 49.2, FLAT: 47.2},
    (5008, 3584, 3584): {LARGE: 196.7, PAIRED: 209.9, SQUARE: 212.4, FLAT: 215.8},
    (512, 18944, 3584): {LARGE: 119.8, PAIRED: 113.5, SQUARE: 114.7, FLAT: 116.9, SMALL: 133.3},
    (1024, 4096, 14336): {LARGE: 151.5, PAIRED: 170.8, SQUARE: 172.9, FLAT: 169.3},
    (1504, 8192, 2048): {LARGE: 75.8, PAIRED: 76.3, SQUARE: 85.9, FLAT: 89.9},
}


def shapes(processors: int, count: int = 2000):
    draw = random.Random(processors)
    for _ in range(count):
        yield draw.randint(65, 20_000), draw.randrange(8, 20_000, 8), draw.randrange(64, 20_000, 8)


@pytest.mark.parametrize("shape", MEASURED, ids=lambda shape: "x".join(map(str, shape)))
def test_the_model_is_near_what_was_measured_and_chooses_nearly_the_fastest(shape):
    M, O, C = shape
    measured = MEASURED[shape]
    expected = {part.tile: expected_time((part,), C, 132) for (part,) in in_one_part(M, O)}
    for tile, microseconds in measured.items():
        assert expected[tile] == pytest.approx(microseconds, rel=0.1), tile
    assert measured[min(expected, key=expected.get)] <= 1.03 * min(measured.values())


@pytest.mark.parametrize("processors", [108, 132, 144])
def test_no_third_of_the_device_is_idle_where_a_wave_of_large_tiles_is_to_do(processors):
    """Whatever the sizes: of all multiprocessors' waves a third at most is lost on the last ones."""
    tried = 0
    for M, O, C in shapes(processors):
        if M * O < processors * LARGE.m * LARGE.o:
            continue
        parts, tried = parts_of_product(M, O, C, processors), tried + 1
        room = 0
        for part in parts:
            full, single = part.tile.waves(part.tiles, processors)
            room += (full * part.tile.resident + single) * processors * part.tile.m * part.tile.o
        done = sum(part.tiles * part.tile.m * part.tile.o for part in parts)
        assert done >= 0.67 * room, (M, O, C)
    assert tried > 1000


@pytest.mark.parametrize("processors", [108, 132, 144])
def test_parts_are_all_tiles_of_one_matrix(processors):
    """Each tile is in one part; only the second part makes them of smaller ones, whole."""
    seen = set()
    for M, O, C in shapes(processors):
        parts = parts_of_product(M, O, C, processors)
        large = parts[0].tile
        assert parts[0].over == (1, 1) and parts[0].first == 0
        assert parts[-1].last == cdiv(M, large.m) * cdiv(O, large.o)
        for part, following in zip(parts, parts[1:], strict=False):
            assert part.first < part.last == following.first < following.last
            over = following.over
            assert (over[0] * following.tile.m, over[1] * following.tile.o) == (large.m, large.o)
            assert part.tiles % (processors * large.resident) == 0, "whole waves"
        seen.add(tuple(part.tile for part in parts))
    assert {(LARGE,), (SMALL,), (SQUARE,), (FLAT,), (PAIRED,), (LARGE, SMALL), (LARGE, FLAT)} <= seen
