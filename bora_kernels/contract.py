"""What the two fused backends agree on: scales, which gradients are asked for, the stand-in for zero magnitudes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NORM_ORDERS = ("row_col", "col_row")
EPS = 1e-12  # norms are clamped here, as in torch.nn.functional.normalize
CHUNK_ELEMENTS = 1 << 22  # dense weights are made in blocks of at most this many elements: 16 MiB in float32


class Scales(NamedTuple):
    """Norms of the adapted weight, clamped at eps, and the magnitudes divided by them (None for an absent axis).

    Between operators they travel as one flat tensor: see ``join_scales`` and ``split_scales``.

    The products are what the Triton backend has left over from the norms and needs again for an exact gradient: V times
    the other axis's factor, which for the axis normalized second carries the square of the first scale.
    """

    row_norm: Tensor | None = None  # [N]
    row_scale: Tensor | None = None  # [N], a = m_r / row_norm
    col_norm: Tensor | None = None  # [K]
    col_scale: Tensor | None = None  # [K], g = m_c / col_norm
    row_product: Tensor | None = None  # [N, R]
    col_product: Tensor | None = None  # [K, R]


def _sections(N: int, K: int, R: int, has_col: bool, products: bool) -> list[tuple[int, tuple[int, ...] | None]]:
    """Start and shape of each field of ``Scales`` in the flat tensor (None for an absent one), and the end."""
    shapes = [(N,), (N,), (K,) if has_col else None, (K,) if has_col else None]
    shapes += [(N, R) if products else None, (K, R) if products and has_col else None, None]
    starts, start = [], 0
    for shape in shapes:
        starts.append(start)
        start += 0 if shape is None else -(-math.prod(shape) // 4) * 4  # kernels load 16 bytes at a time
    return list(zip(starts, shapes, strict=True))


def scales_size(N: int, K: int, R: int, has_col: bool, products: bool) -> int:
    """Elements of the flat tensor."""
    return _sections(N, K, R, has_col, products)[-1][0]


def split_scales(flat: Tensor | None, N: int, K: int, R: int, has_col: bool) -> Scales:
    """The fields of a flat tensor, as views; products where it holds them."""
    if flat is None:
        return Scales()
    products = flat.numel() > scales_size(N, K, R, has_col, False)
    return Scales(
        *(
            None if shape is None else flat[start : start + math.prod(shape)].view(shape)
            for start, shape in _sections(N, K, R, has_col, products)[:-1]
        )
    )


def join_scales(scales: Scales, N: int, K: int, R: int) -> Tensor:
    """One flat tensor that holds these scales."""
    sections = _sections(N, K, R, scales.col_norm is not None, scales.row_product is not None)
    pieces, end = [], 0
    for (start, shape), value in zip(sections, scales, strict=False):
        if value is not None:
            pieces += [scales.row_norm.new_zeros(start - end)] if start > end else []
            pieces.append(value.flatten())
            end = start + math.prod(shape)
    pieces += [scales.row_norm.new_zeros(sections[-1][0] - end)] if sections[-1][0] > end else []
    return torch.cat(pieces)


class Completion(NamedTuple):
    """What adds up over the shards of a weight the sums with an entry for each row, and those for each column.

    None where a sum is complete as it is: both for a whole weight, ``row`` for a shard that holds whole rows.
    """

    row: Callable[[Tensor], Tensor] | None = None
    col: Callable[[Tensor], Tensor] | None = None


COMPLETE = Completion()


class Needs(NamedTuple):
    """Which gradients a backward has to produce; the order is that of the arguments of ``bora_linear``."""

    x: bool
    lora_A: bool
    lora_B: bool
    magnitude_row: bool
    magnitude_col: bool

    def norm_paths(self, has_row: bool, has_col: bool, norm_order: str, detach_norm: bool) -> bool:
        """Whether gradients flow through the norms: to the factors, and to the first-normalized axis's magnitude.

        ``has_row`` and ``has_col`` say which magnitudes the layer has.
        """
        if detach_norm or not has_row:
            return False
        first = self.magnitude_row if norm_order == "row_col" else self.magnitude_col
        return self.lora_A or self.lora_B or (first and has_col)

    def sums(self, has_row: bool, has_col: bool, norm_order: str, detach_norm: bool) -> tuple[bool, bool]:
        """Whether S (rows) and D (columns), the sums behind the magnitude gradients, are needed."""
        paths = self.norm_paths(has_row, has_col, norm_order, detach_norm)
        return has_row and (self.magnitude_row or paths), has_col and (self.magnitude_col or paths)


def zero_stand_in(dtype: torch.dtype) -> float:
    """The scale that stands for a zero one where a product is made that a magnitude gradient is taken from.

    dm = S/m is 0/0 at m = 0 while the true gradient is not 0. With a tiny scale in place of zero both S and m are
    tiny and their quotient is right. float16 has no room for tiny values: there the stand-in is 1, and the product
    is kept apart from the output (``separate_product``).
    """
    return 1.0 if dtype == torch.float16 else 2.0**-60


def separate_product(dtype: torch.dtype, bias: Tensor | None) -> bool:
    """Whether the product before the bias is saved apart from the output.

    Subtracting a large bias from a rounded output would cancel, so S is never taken from the output of a layer with
    a bias; for float16 see ``zero_stand_in``.
    """
    return bias is not None or dtype == torch.float16


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms, scales and low-rank products are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def projection_parts(columns: int, rank: int) -> int:
    """Into how many parts the Triton backend may split the columns behind u and v, to keep the device busy.

    It is what is allocated, so it depends on static sizes only; see ``kernels.config.parts_in_use``.
    """
    return max(1, min(4, columns // 1024)) if rank <= 64 else 1
