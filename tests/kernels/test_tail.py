"""What ends a projection: its parts added, in their order and however many are loaded at a time."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.kernels.config import cdiv, split_config
from bora_kernels.kernels.tail import add_parts


@pytest.mark.parametrize("R", [3, 16, 64, 70], ids="R{}".format)
@pytest.mark.parametrize("count", [2, 4, 5, 8, 9, 16, 17])
def test_parts_are_added_one_after_the_other(count, R, device):
    generator = torch.Generator(device).manual_seed(count)
    sizes = 10.0 ** torch.randint(-4, 5, (count, 1, 1), generator=generator, device=device)  # another order would show
    parts = sizes * torch.randn(count, 37, R, generator=generator, device=device)
    expected = torch.zeros_like(parts[0])
    for part in parts:
        expected += part
    projection, rounded = add_parts(parts, None, None)
    assert torch.equal(projection, expected) and rounded is None


@pytest.mark.parametrize("R", [1, 16, 24, 64, 256])
@pytest.mark.parametrize("tokens", [512, 777, 1024, 2048, 8192])
def test_many_programs_end_a_projection(tokens, R):
    """Each has few elements, so that it loads all parts of them at once and no multiprocessor idles meanwhile."""
    config = split_config(R)
    elements = config["BLOCK_SIZE"] * config["BLOCK_SIZE_R"]
    programs = cdiv(tokens, config["BLOCK_SIZE"]) * cdiv(R, config["BLOCK_SIZE_R"])
    assert elements <= 16 * 32 * config["num_warps"] // 4
    assert programs >= min(132, tokens * R // 512)
