"""The base product: in several launches, each with tiles of its own, and with a low-rank tail."""

import pytest
import torch
from helpers.cases import HALVES, NAMES, Case, cancelled, check_layer, require, undone

pytest.importorskip("triton", reason="needs triton")

from bora_kernels import replay_disabled
from bora_kernels.kernels import config, gemm
from bora_kernels.kernels.config import cdiv, gemm_tile

pytestmark = pytest.mark.sampled(4)


@pytest.fixture
def in_two_launches(monkeypatch):
    """Tiles of 64 x 128, of which the first launch makes some whole and the second the others in blocks."""

    def split_after(share, blocks, programs):
        block_m, block_o, block_c = blocks

        def config(M, O, C, dtype, device_index, descriptors_fit, aligned, dropout):
            tiles = cdiv(M, 64) * cdiv(O, 128)
            whole = max(1, int(share * tiles))
            tile = gemm_tile(0, 4, M, O, dtype, descriptors_fit, aligned, dropout) | {"GROUP_SIZE_M": 2, "STORES": 1}
            tile |= {"USE_DESCRIPTORS": descriptors_fit, "BLOCK_SIZE_M": 64, "BLOCK_SIZE_O": 128, "BLOCK_SIZE_C": 32}
            first = tile | {"OVER_M": 1, "OVER_O": 1, "first_tile": 0, "num_tiles": whole}
            second = tile | {"BLOCK_SIZE_M": block_m, "BLOCK_SIZE_O": block_o, "BLOCK_SIZE_C": block_c}
            second |= {"OVER_M": 64 // block_m, "OVER_O": 128 // block_o}
            second |= {"first_tile": whole, "num_tiles": tiles - whole}
            launched.append((whole, tiles))
            return ((programs,), second), ((programs,), first)

        monkeypatch.setattr(gemm, "gemm_config", config)

    launched = []
    split_after.launched = launched
    with replay_disabled():  # a recording knows nothing of another rule
        yield split_after


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=NAMES.get)
@pytest.mark.parametrize(
    "share, blocks, programs",
    [(0.3, (64, 64, 32), 2), (0.7, (32, 128, 16), 3), (0.5, (16, 32, 64), 5)],
    ids=["halves along o", "halves along m", "sixteenths"],
)
def test_each_tile_is_made_once_whichever_launch_it_is_in(dtype, share, blocks, programs, in_two_launches, device):
    """Sizes that end inside a tile and inside a block of it; a bias and a product that is kept apart."""
    require("triton", dtype)
    in_two_launches(share, blocks, programs)
    case = Case(145, 144, 176, 5, dtype=dtype, seed=programs)
    check_layer("triton", case.inputs(device), case.upstream(device))
    assert len(in_two_launches.launched) >= 2
    assert all(0 < whole < tiles for whole, tiles in in_two_launches.launched)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=NAMES.get)
def test_cancelled_lines_in_two_launches(dtype, in_two_launches, device):
    """Their steps differ in number where blocks differ along the inner dimension, with and without the third term."""
    require("triton", dtype)
    in_two_launches(0.5, (32, 64, 16), 3)
    case = Case(72, 144, 168, 12, dtype=dtype, seed=3)
    check_layer("triton", cancelled(case.inputs(device), "row", 0.01), case.upstream(device))


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize("R", [4, 12, 24])
@pytest.mark.parametrize("left", [1.0, 5e-3])
def test_tail_of_a_product(dtype, R, left, device, monkeypatch):
    """Of tiles that descriptors load: its third term is left out, with the steps it takes, where no line cancels."""
    require("triton", dtype)
    seen, plain_tile = [], config.gemm_tile

    def tile(arch, processors, M, O, dtype, descriptors_fit, *rest):
        seen.append(descriptors_fit)
        chosen = plain_tile(arch, processors, M, O, dtype, descriptors_fit, *rest)
        return chosen | {"USE_DESCRIPTORS": descriptors_fit, "BLOCK_SIZE_C": 16} if arch == 0 else chosen

    monkeypatch.setattr(config, "gemm_tile", tile)
    config.gemm_config.cache_clear()
    case = Case(24, 48, 72, R, dtype=dtype, seed=3)
    inputs = case.inputs(device) if left == 1.0 else undone(case.inputs(device), "row", left)
    check_layer("triton", inputs, case.upstream(device))
    config.gemm_config.cache_clear()
    assert all(seen)
