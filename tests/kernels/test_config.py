"""Launch grids by a model of the device: nothing is left idle that more splits would use."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.contract import projection_parts
from bora_kernels.kernels.config import cdiv, parts_in_use
from bora_kernels.kernels.mixed_config import mixed_apart_config, mixed_few_config, mixed_project_config


@pytest.mark.parametrize("processors", [108, 132, 144])
@pytest.mark.parametrize("columns", [512, 1024, 3584, 4096, 18944])
def test_a_projection_fills_the_device_and_takes_no_more_parts_than_that(processors, columns):
    """Over all numbers of tokens: a multiprocessor has no program only where all parts are in use already."""
    allocated = projection_parts(columns, 16)
    for tokens in range(1, 40_000, 37):
        parts = parts_in_use(allocated, tokens, processors)
        blocks = cdiv(tokens, 64)
        assert 1 <= parts <= allocated
        if parts < allocated:
            assert blocks * (parts + 1) > 2 * processors, "another part would still have been within two programs each"
        if parts > 1:
            assert (tokens // 64) * parts <= 2 * processors


@pytest.mark.parametrize("processors", [108, 132, 144])
@pytest.mark.parametrize("N", [96, 640, 1024, 5120, 11008, 14336, 28672])
def test_few_tokens_of_a_mixed_batch_split_the_columns_as_far_as_the_device_has_room(processors, N):
    for M in (1, 3, 16, 17, 33, 64):
        for K in (64, 640, 4096, 14336):
            for descriptors_fit in (False, True):
                splits, config = mixed_few_config(90, processors, M, N, K, torch.bfloat16, descriptors_fit, False)
                programs = cdiv(M, config["BLOCK_SIZE_M"]) * cdiv(N, config["BLOCK_SIZE_N"])
                room = processors // 2 if config["USE_DESCRIPTORS"] else 2 * processors
                assert config["BLOCK_SIZE_M"] >= M
                assert splits == 1 or programs * splits <= room
                whole = splits == 8 or cdiv(K, splits + 1) < 4 * config["BLOCK_SIZE_C"]
                assert whole or programs * (splits + 1) > room, "another split would still have had room"


@pytest.mark.parametrize("processors", [114, 132, 144])
@pytest.mark.parametrize("N", [18, 640, 1024, 3072, 4096, 8192, 14336])
def test_parts_added_by_a_launch_of_their_own_run_all_at_once(processors, N):
    for M in (33, 48, 64):
        for K in (64, 640, 4096, 14336):
            apart = mixed_apart_config(90, processors, M, N, K, 16, torch.bfloat16, True, False)
            programs = cdiv(N, 64)
            if apart is None:
                assert 2 * programs > processors or K <= 256
            else:
                splits, config = apart
                assert config["BLOCK_SIZE_M"] >= M and programs * splits <= processors
                assert splits == 8 or cdiv(K, splits + 1) < 256 or programs * (splits + 1) > processors
    assert mixed_apart_config(90, processors, 32, N, 4096, 16, torch.bfloat16, True, False) is None


@pytest.mark.parametrize("R", [1, 16, 40, 512])
def test_projections_of_a_mixed_batch_leave_a_product_few_parts_to_add(R):
    for M in (65, 200, 513, 1024, 3000, 20_000):
        parts, config = mixed_project_config(90, 132, M, 4096, R, torch.bfloat16, True)
        tiles = cdiv(M, config["BLOCK_SIZE_M"])
        assert 1 <= parts <= 8 and (parts == 1 or tiles * parts <= 2 * 132)
        assert parts * min(R, 64) * 4 <= 8 * 64  # float32 values that a row of a tile reads
