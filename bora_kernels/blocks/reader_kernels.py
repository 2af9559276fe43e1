"""The backward of layers that read one x, on Triton kernels, as far as it is theirs together.

each layer   dy⊙a, v and dx_i;  dB and S beside the product
all          dx = Σ dx_i, and the parts of dA_i and D_i: one read of x, one of each dx_i
each layer   what the sums end in: dA_i, the magnitudes' gradients and the norm paths

Equations (3) to (11) of ``ops.torch_backend`` for each layer. The forward is each layer's own: one read of x for the
folds of two layers fills the registers, and takes as long as two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Adapter, Needs, Options, Scales, given, split_scales, zero_stand_in
from ..kernels.combine import combine
from ..kernels.joint_config import joint_rank
from ..kernels.low_rank import reduce
from ..kernels.shared_sums import Share, shared_sums
from ..ops.triton_parts import Sums, add_norm_paths, product_precision, through
from ..replay.recording import beside_last_launch, empty

Parts = tuple[Tensor | None, Tensor | None]  # of a factor's gradient and of S or D, one for each split of the tokens
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of an adapter's tensors, float32


class Layer(NamedTuple):
    """A layer of the block in a backward. A frozen one has a weight alone."""

    weight: Tensor  # [N, K]
    adapter: Adapter | None = None
    flat_scales: Tensor | None = None
    product: Tensor | None = None  # [M, N], for S
    u: Tensor | None = None  # in parts, for dB
    options: Options = Options(1.0)
    needs: Needs = Needs(True, False, False, False, False)

    def sums(self) -> tuple[bool, bool]:
        """Whether S and D are needed."""
        members = given(self.adapter).members
        return self.needs.sums(members, self.needs.norm_paths(members, self.options))

    def scales(self) -> Scales:
        adapter = given(self.adapter)
        return split_scales(self.flat_scales, self.weight.shape, adapter.lora_A.shape[0], adapter.members)

    def keywords(self) -> dict:
        """Of a stage."""
        scaling, norm_order, detach_norm, _, eps, _ = self.options
        return {
            "scaling": scaling, "norm_order": norm_order, "detach_norm": detach_norm, "eps": eps, "needs": self.needs,
            "weight_precision": product_precision(self.weight.dtype),
        }  # fmt: skip


def share_sums(layers: Sequence[Layer], dtype: torch.dtype) -> bool:
    """Whether ``backward`` takes these layers, for x of this dtype."""
    if len(layers) not in (2, 3) or dtype == torch.float16:  # whose products lie apart from the gradients of x
        return False
    for layer in layers:
        if layer.adapter is None or not layer.needs.x or layer.adapter.lora_A.shape[0] > joint_rank(dtype):
            return False
    return any(layer.needs.lora_A or layer.sums()[1] for layer in layers)


def backward(
    dys: list[Tensor],
    layers: Sequence[Layer],
    make_x: Callable[[], Tensor | None],
    row_parts: Sequence[Parts] | None,
    precision: str,
) -> tuple[Tensor, list[Gradients]]:
    """In a stage: dx [M, K], and the gradients of each layer's adapter.

    ``dys`` are dy_i [M, N_i], or dy_i⊙a_i where ``row_parts`` has the parts of dB and S; each is taken out when it has
    been read.
    """
    shares: list[Share] = []
    of_rows = list(row_parts or ())
    for layer in layers:
        dy, adapter, scales = dys.pop(0), given(layer.adapter), layer.scales()
        needs_S, needs_D = layer.sums()
        dx, _, v = through(
            dy, layer.weight, adapter, scales, None, folded=row_parts is not None, needs_dx=True, needs_D=needs_D,
            scaling=layer.options.scaling, precision=precision,
        )  # fmt: skip
        if row_parts is None:
            parts: Parts = (None, None)
            if layer.needs.lora_B or needs_S:
                with beside_last_launch():
                    parts = reduce(
                        dy, layer.product if needs_S else None, layer.u if layer.needs.lora_B else None,
                        scales.cancelled, None, dropout_p=0.0, precision=precision,
                    )  # fmt: skip
            of_rows.append(parts)
        del dy
        shares.append(Share(given(dx), v if layer.needs.lora_A else None, needs_D, scales.cancelled))
    total, of_columns = shared_sums(given(make_x()), shares, precision=precision)
    del shares
    stand_in = zero_stand_in(total.dtype)
    return total, [_end(*each, stand_in) for each in zip(layers, of_rows, of_columns, strict=True)]


def _end(layer: Layer, of_rows: Parts, of_columns: Parts, stand_in: float) -> Gradients:
    adapter, scales = given(layer.adapter), layer.flat_scales
    row = combined(adapter, layer.weight, scales, of_rows, True, layer.options.eps, stand_in)
    col = combined(adapter, layer.weight, scales, of_columns, False, layer.options.eps, stand_in)
    return gradients_of(layer.weight, adapter, scales, row, col, stand_in=stand_in, **layer.keywords())


def combined(
    adapter: Adapter, weight: Tensor, flat_scales: Tensor | None, parts: Parts, rows: bool, eps: float, stand_in: float
) -> Sums:
    """(5), (6) and (7) for one axis: the coefficient of its norm path, and the gradients of magnitude and factor."""
    factor_parts, total_parts = parts
    if factor_parts is None and total_parts is None:
        return None, None, None
    scales = split_scales(flat_scales, weight.shape, adapter.lora_A.shape[0], adapter.members)
    scale, norm, magnitude, factor = (
        (scales.row_scale, scales.row_norm, adapter.magnitude_row, adapter.lora_B)
        if rows
        else (scales.col_scale, scales.col_norm, adapter.magnitude_col, adapter.lora_A)
    )
    d_factor = None if factor_parts is None else empty(tuple(factor.shape), torch.float32, weight.device)
    out = d_factor if rows or d_factor is None else d_factor.T
    coefficient, d_magnitude = combine(
        factor_parts, total_parts, scale, norm, magnitude, out, multiplier=1.0, eps=eps, stand_in=stand_in
    )
    return coefficient, d_magnitude, d_factor


def gradients_of(
    weight, adapter, flat_scales, row: Sums, col: Sums, *,
    scaling, norm_order, detach_norm, eps, stand_in, needs, weight_precision,
) -> Gradients:  # fmt: skip
    """dA, dB, dm_row and dm_col with the paths through the norms, as far as they are needed."""
    if needs.norm_paths(adapter.members, Options(scaling, norm_order, detach_norm)):
        scales = split_scales(flat_scales, weight.shape, adapter.lora_A.shape[0], adapter.members)
        add_norm_paths(
            weight, adapter, scales, row, col,
            norm_order=norm_order, scaling=scaling, eps=eps, stand_in=stand_in, precision=weight_precision,
        )  # fmt: skip
    made = (col[2], row[2], row[1], col[1])
    return tuple(g if need else None for g, need in zip(made, needs[1:], strict=True))  # type: ignore[return-value]
