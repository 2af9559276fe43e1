"""The parts of a Gram matrix, added by a launch of their own where ranks are many."""

import pytest
import torch
from helpers.cases import Case, check_layer, orders, require

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.kernels.gram import add_gram

pytestmark = pytest.mark.sampled(4)


@pytest.mark.parametrize("splits", [2, 5, 8, 13])
def test_parts_are_added_one_after_the_other_and_nothing_else_changes(splits, device):
    I, R = 37, 70
    generator = torch.Generator(device).manual_seed(splits)
    sizes = 10.0 ** torch.randint(-4, 5, (splits, 1, 1), generator=generator, device=device)
    products = sizes * torch.randn(splits, I + R, R, generator=generator, device=device)
    expected = products.clone()
    for part in products[1:]:
        expected[0, I:] += part[I:]
    assert add_gram(products, I) == 1
    assert torch.equal(products, expected)


def test_few_ranks_are_left_to_the_programs_that_read_them(device):
    products = torch.randn(4, 8 + 16, 16, device=device)
    before = products.clone()
    assert add_gram(products, 8) == 4 and add_gram(products[:1], 8) == 1
    assert torch.equal(products, before)


@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_of_more_ranks_than_a_tile_and_more_columns_than_a_split(order, dtype, device):
    require("triton", dtype)
    case = Case(9, 40, 300, 70, dtype=dtype, order=order)
    check_layer("triton", case.inputs(device), case.upstream(device), norm_order=order)
