"""What ends a projection: its parts added, in their order and however many are loaded at a time."""

import pytest
import torch
from helpers.cases import HALVES, NAMES, require

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.kernels.config import cdiv, split_config
from bora_kernels.kernels.tail import add_parts, split_low_rank

BF16, FP16 = HALVES


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


@pytest.mark.parametrize("count, rows_are_outputs", [(1, False), (3, True)])
@pytest.mark.parametrize("cancelled", [None, False, True])
@pytest.mark.parametrize(
    "dtype, factor_dtype", [(BF16, torch.float32), (BF16, BF16), (FP16, FP16), (FP16, BF16)], ids=NAMES.get
)
def test_tails_have_the_terms_that_there_are(factor_dtype, dtype, cancelled, rows_are_outputs, count, device):
    """A factor in the product's own dtype is one number, not a sum of two."""
    require("triton", torch.bfloat16)
    M, O, R = 21, 40, 19
    randn = torch.Generator(device).manual_seed(0)
    parts, rounded = (torch.randn(count, M, R, generator=randn, device=device) for _ in range(2))
    factor = torch.randn(R, O, generator=randn, device=device).to(factor_dtype)
    word = None if cancelled is None else torch.tensor([0.0, float(cancelled)], device=device)
    given = (parts, rounded) if count > 1 else (parts[0], rounded[0])
    projection, left, right = split_low_rank(
        given[0], None if word is None else given[1], factor, word, dtype, rows_are_outputs
    )
    terms = (1 if factor_dtype == dtype else 2) + (word is not None)
    right = right.T if rows_are_outputs else right
    assert left.shape == (M, terms * R) and right.shape == (terms * R, O) and left.dtype == right.dtype == dtype
    assert torch.equal(projection, sum(parts[1:], parts[0]))  # one after the other

    used = (rounded if cancelled else parts).double().sum(0)
    high, all_of_factor = used.float().to(dtype).double(), factor.double()
    needed = terms - (word is not None)
    digits = 2.0**-15 if dtype == torch.bfloat16 else 2.0**-19
    product = left[:, : needed * R].double() @ right[: needed * R].double()
    torch.testing.assert_close(product, high @ all_of_factor, rtol=0, atol=digits * product.abs().max().item())
    if word is not None:
        product += left[:, needed * R :].double() @ right[needed * R :].double()
        torch.testing.assert_close(product, used @ all_of_factor, rtol=0, atol=digits * product.abs().max().item())
