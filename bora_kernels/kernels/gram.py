"""The parts of a Gram matrix added once, where each program that ends norms would add them all again."""

import triton
import triton.language as tl
from torch import Tensor

from ..replay.recording import launch
from .common import sum_vectors
from .config import cdiv, gram_config
from .overlap import overlapping, wait_for_last


@triton.jit
def _add_gram_kernel(
    products_ptr,  # [splits, I + R, R], contiguous; G, below X, of the first split is replaced by the sum
    splits, I,
    R: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAP)
    offs = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    ptr = products_ptr + I * R
    gram = sum_vectors(ptr, (I + R) * R, splits, offs, R * R)
    tl.store(ptr + offs, gram, mask=offs < R * R)


def add_gram(products: Tensor, I: int) -> int:
    """Add the parts of G that ``moments`` leaves below X [I, R], where that pays; returns how many are left."""
    splits, _, R = products.shape
    if splits == 1 or R <= 32:  # few bytes, of which an L1 cache holds all
        return splits
    config = gram_config() | overlapping(products.get_device())
    launch(_add_gram_kernel, (cdiv(R * R, config["BLOCK_SIZE"]),), (products,), splits=splits, I=I, R=R, **config)
    return 1
