"""What all parts of a layer agree on: its tensors and options, scales, needed gradients, the zero magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar, get_args, overload

import torch
from torch import Tensor

NormOrder = Literal["row_col", "col_row"]
Backend = Literal["triton", "torch", "reference"]
Evaluation = Literal[Backend, "dense"]
Activation = Literal["silu", "gelu", "gelu_tanh"]  # of a gated MLP; the last is GELU's approximation by tanh
NORM_ORDERS: tuple[NormOrder, ...] = get_args(NormOrder)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
T = TypeVar("T")
EPS = 1e-12  # norms are clamped here, as in torch.nn.functional.normalize
SHORT_AXIS = 16  # a weight with so few rows or columns is no larger than a pair of factors: see ``evaluation``
CHUNK_ELEMENTS = 1 << 22  # dense weights are made in blocks of at most this many elements: 16 MiB in float32


class Members(NamedTuple):
    """Which magnitudes a layer has: both (BoRA), that of the rows (DoRA), that of the columns, or none (LoRA)."""

    row: bool
    col: bool

    def rows_first(self, norm_order: NormOrder) -> bool:
        """Whether the norms of rows are taken first. An axis without a magnitude is not normalized at all."""
        return self.row and (norm_order == "row_col" or not self.col)


class Adapter(NamedTuple):
    """The trained tensors of a layer; None for a magnitude that it does not have."""

    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    magnitude_row: Tensor | None = None  # [N]
    magnitude_col: Tensor | None = None  # [K]

    @property
    def members(self) -> Members:
        return Members(self.magnitude_row is not None, self.magnitude_col is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> Adapter:
        """An adapter of what the function makes of each tensor that there is."""
        lora_A, lora_B, row, col = self
        row, col = None if row is None else function(row), None if col is None else function(col)
        return Adapter(function(lora_A), function(lora_B), row, col)

    def magnitudes(self, rows_first: bool) -> tuple[Tensor, Tensor | None]:
        """That of the axis normalized first, which there is, and that of the other one."""
        row, col = self.magnitude_row, self.magnitude_col
        return (given(row), col) if rows_first else (given(col), row)


class Options(NamedTuple):
    """What a layer computes with besides tensors; see ``bora_linear``."""

    scaling: float
    norm_order: NormOrder = "row_col"
    detach_norm: bool = False
    dropout_p: float = 0.0  # 0 outside of training
    eps: float = EPS
    backend: Evaluation | None = None  # None until it is chosen; then what ``evaluation`` says


def evaluation(backend: Backend, shape: Sequence[int]) -> Evaluation:
    """How a backend evaluates a layer with a weight [N, K]: as itself, or as "dense" where an axis is short.

    There whole rows or columns of W0 and s·B·A cancel, which only V itself survives: ``ops.dense_backend``.
    """
    return "dense" if backend != "reference" and min(shape) <= SHORT_AXIS else backend


class Scales(NamedTuple):
    """Norms of the adapted weight, clamped at eps, and the magnitudes divided by them (None for an absent axis).

    Between operators they travel as one flat tensor: see ``flatten_scales`` and ``split_scales``.

    The products are what the Triton backend has left over from the norms and needs again for an exact gradient: V times
    the other axis's factor, which for the axis normalized second carries the square of the first scale.

    ``cancelled`` is not 0 where s·B·A leaves little of W0 in a line of the axis normalized first, or of the second.
    Such a line's scale is large, and so is the line's part of every sum over the other axis: differences of W0 and
    s·B·A are too inexact there, and what is computed from them is computed from V.
    """

    row_norm: Tensor | None = None  # [N]
    row_scale: Tensor | None = None  # [N], a = m_r / row_norm
    col_norm: Tensor | None = None  # [K]
    col_scale: Tensor | None = None  # [K], g = m_c / col_norm
    cancelled: Tensor | None = None  # [4], of which two are to fill 16 bytes
    row_product: Tensor | None = None  # [N, R]
    col_product: Tensor | None = None  # [K, R]

    @property
    def members(self) -> Members:
        return Members(self.row_norm is not None, self.col_norm is not None)


def _sections(
    shape: Sequence[int], R: int, members: Members, products: bool
) -> tuple[list[tuple[int, ...] | None], list[int]]:
    """Shapes of the fields of ``Scales`` in the flat tensor (None for an absent one), and what each takes there.

    A recorded forward reads scales with and without products alike, so products come last.
    """
    (N, K), (row, col) = shape, members
    shapes: list[tuple[int, ...] | None]
    shapes = [(N,) if row else None, (N,) if row else None, (K,) if col else None, (K,) if col else None]
    shapes += [(4,) if row or col else None]
    shapes += [(N, R) if products and row else None, (K, R) if products and col else None]
    sizes = [0 if field is None else math.prod(field) for field in shapes]
    return shapes, [-(-size // 4) * 4 for size in sizes]  # kernels load 16 bytes at a time


def scales_size(shape: Sequence[int], R: int, members: Members, products: bool) -> int:
    """Elements of the flat tensor for a weight of shape [N, K]."""
    return sum(_sections(shape, R, members, products)[1])


def split_scales(flat: Tensor | None, shape: Sequence[int], R: int, members: Members) -> Scales:
    """The fields of a flat tensor, as views; products where it holds them."""
    if flat is None:
        return Scales()
    products = flat.numel() > scales_size(shape, R, members, False)
    shapes, sizes = _sections(shape, R, members, products)
    fields = zip(shapes, flat.split_with_sizes(sizes), strict=True)
    return Scales(*[None if shape is None else _field(part, shape) for shape, part in fields])


def _field(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape)
    part = part if part.numel() == size else part[:size]
    return part if len(shape) == 1 else part.view(shape)


def flatten_scales(scales: Scales, shape: Sequence[int], R: int) -> Tensor:
    """One flat tensor that holds these scales, of which there is one at least."""
    products = scales.row_product is not None or scales.col_product is not None
    present = next(value for value in scales if value is not None)
    parts = []
    for value, size in zip(scales, _sections(shape, R, scales.members, products)[1], strict=True):
        if value is not None and size:
            parts.append(value.reshape(-1))
            size -= value.numel()
        if size:
            parts.append(present.new_zeros(size))
    return torch.cat(parts)


class Slots(NamedTuple):
    """The adapters of a bank, stacked; a rank or a scale that an adapter lacks is there as zeros or ones.

    Slot 0 is the base layer's: scales of one, factors of zero.
    """

    lora_A: Tensor  # [slots, R, K]
    lora_B: Tensor  # [slots, R, N], (s·B)ᵀ
    row_scale: Tensor  # [slots, N], a, in the accumulation dtype
    col_scale: Tensor  # [slots, K], g


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

    def norm_paths(self, members: Members, options: Options) -> bool:
        """Whether gradients flow through the norms: to the factors, and to the first-normalized axis's magnitude."""
        if options.detach_norm or not any(members):
            return False
        first = self.magnitude_row if members.rows_first(options.norm_order) else self.magnitude_col
        return self.lora_A or self.lora_B or (first and all(members))

    def sums(self, members: Members, paths: bool) -> tuple[bool, bool]:
        """Whether S (rows) and D (columns), the sums behind the magnitudes' gradients and norm paths, are needed."""
        return members.row and (self.magnitude_row or paths), members.col and (self.magnitude_col or paths)


@overload
def flat(t: Tensor) -> Tensor: ...
@overload
def flat(t: None) -> None: ...
@overload
def flat(t: Tensor | None) -> Tensor | None: ...
def flat(t: Tensor | None) -> Tensor | None:
    """[..., C] -> [M, C]"""
    return t if t is None or t.ndim == 2 else t.reshape(-1, t.shape[-1])


def unflat(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """[M, C] -> [*lead, C], not as a view, so that an output may be changed in place."""
    return rows if len(lead) == 1 else torch.ops.aten._unsafe_view(rows, [*lead, rows.shape[1]])


def given(value: T | None) -> T:
    """What is there wherever this is called, by a layer's members or a call's needs, which its type does not say."""
    if value is None:
        raise RuntimeError("a tensor or an option is missing that the layer's members or the call's needs ask for")
    return value


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
