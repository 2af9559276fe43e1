"""Launch grids by a model of the device: nothing is left idle that more splits would use."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.kernels.config import cdiv, project_config, reduce_config
from bora_kernels.kernels.joint_config import gate_sums_config, shared_sums_config
from bora_kernels.kernels.mixed_config import mixed_apart_config, mixed_few_config, mixed_project_config
from bora_kernels.kernels.wide_config import project_wide_config, reduce_wide_config

SIZES = (64, 512, 1024, 1536, 2304, 3072, 3584, 4096, 8192, 11008, 14336, 18944, 28672)
TOKENS = (1, 16, 100, 512, 777, 1000, 1024, 1500, 2048, 3000, 4096, 5000, 6144, 7001, 8192, 9000, 12_288, 16_384)
LAYERS = [(M, C, R) for M in TOKENS for C in SIZES for R in (1, 16, 32, 40, 64, 100, 128, 256)]
KINDS = [  # dtype, aligned, dropout
    (torch.bfloat16, True, False),
    (torch.bfloat16, True, True),
    (torch.float16, False, False),
    (torch.float32, True, False),
]


@pytest.mark.parametrize("processors", [78, 108, 132, 148])
@pytest.mark.parametrize("dtype, aligned, dropout", KINDS)
@pytest.mark.parametrize("arch", [80, 90])
def test_passes_over_tokens_leave_no_third_of_the_device_idle(arch, dtype, aligned, dropout, processors):
    """Where more splits would fill it: up to 16, each with something to do."""
    for M, C, R in LAYERS:
        for splits, config, lines, length in (
            (*project_config(arch, processors, M, C, R, dtype, aligned, dropout), ("M", M), ("C", C)),
            (*reduce_config(arch, processors, M, C, R, dtype, aligned, dropout), ("C", C), ("M", M)),
        ):
            blocks = cdiv(lines[1], config[f"BLOCK_SIZE_{lines[0]}"]) * cdiv(R, config["BLOCK_SIZE_R"])
            steps = cdiv(length[1], config[f"BLOCK_SIZE_{length[0]}"])
            assert 1 <= splits <= min(16, steps)
            assert (splits - 1) * cdiv(steps, splits) < steps, "a split has nothing to do"
            if 3 * blocks * splits < 2 * processors:
                shorter = [s for s in range(splits + 1, min(16, steps) + 1) if cdiv(steps, s) < cdiv(steps, splits)]
                assert not shorter, f"{blocks * splits} programs for {processors} multiprocessors: {M, C, R, config}"


@pytest.mark.parametrize("processors", [78, 108, 132, 148])
@pytest.mark.parametrize("R", [1, 16, 24, 32, 64])
@pytest.mark.parametrize(
    "config_of, layers", [(gate_sums_config, ()), (shared_sums_config, (2,)), (shared_sums_config, (3,))]
)
def test_sums_of_several_layers_leave_no_third_of_the_device_idle(config_of, layers, R, processors):
    for M, C in itertools.product(TOKENS, SIZES):
        splits, config = config_of(90, processors, M, C, R, torch.bfloat16, True, *layers)
        blocks, steps = cdiv(C, config["BLOCK_SIZE_C"]), cdiv(M, config["BLOCK_SIZE_M"])
        assert 1 <= splits <= min(32, steps)
        assert (splits - 1) * cdiv(steps, splits) < steps, "a split has nothing to do"
        if 3 * blocks * splits < 2 * processors:
            shorter = [s for s in range(splits + 1, min(32, steps) + 1) if cdiv(steps, s) < cdiv(steps, splits)]
            assert not shorter, f"{blocks * splits} programs for {processors} multiprocessors: {M, C, R, config}"


@pytest.mark.parametrize("processors", [78, 114, 132])
@pytest.mark.parametrize("R", [17, 32, 40, 64, 100, 128, 200, 256, 300, 512])
def test_passes_at_larger_ranks_give_no_multiprocessor_much_more_than_its_share(R, processors):
    for M, C in itertools.product(TOKENS, SIZES):
        options = [(project_wide_config(90, processors, M, C, R), ("M", M), ("C", C))]
        if sums := reduce_wide_config(90, processors, M, C, R):
            options.append((sums, ("C", C), ("M", M)))
        for (splits, config), lines, length in options:
            blocks = cdiv(lines[1], config[f"BLOCK_SIZE_{lines[0]}"]) * cdiv(R, config["BLOCK_SIZE_R"])
            steps = cdiv(length[1], config[f"BLOCK_SIZE_{length[0]}"])
            assert 1 <= splits <= min(16, steps)
            assert (splits - 1) * cdiv(steps, splits) < steps, "a split has nothing to do"
            longest = cdiv(blocks * splits, processors) * cdiv(steps, splits)
            assert splits == 16 or longest <= 8 + 1.75 * blocks * steps / processors, (M, C, splits, config)


@pytest.mark.parametrize("tokens", [512, 1000, 1500, 2048, 3000, 5000])
@pytest.mark.parametrize("columns", [1024, 2048, 3584, 4096, 8192, 14336, 18944])
def test_no_multiprocessor_has_half_more_than_its_share_of_a_projection(tokens, columns):
    parts, config = project_config(90, 132, tokens, columns, 16, torch.bfloat16, True, False)
    blocks, steps = cdiv(tokens, config["BLOCK_SIZE_M"]), cdiv(columns, config["BLOCK_SIZE_C"])
    longest = cdiv(blocks * parts, 132) * cdiv(steps, parts)
    assert longest <= 1 + 1.5 * blocks * steps / 132


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
