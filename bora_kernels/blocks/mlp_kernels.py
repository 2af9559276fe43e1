"""The backward of a gated MLP on Triton kernels, where e, f and dh are read once for all that is made of them.

    down       dy⊙a_d, v_d      dh      parts of dB_d and S_d
    the gate   one read of e, f, dh: de⊙a_e over dh, df⊙a_f, parts of dB_e, S_e, dB_f, S_f, dA_d, D_d; h is not stored
    down       dA_d, dB_d, its magnitudes' gradients and norm paths
    gate, up   v and dx from the stored de⊙a (df⊙a), parts of dA and D, and the same end: see ``reader_kernels``

Equations (3) to (11) of ``ops.torch_backend`` for each layer, e = gate(x), f = up(x), h = act(e)⊙f and y = down(h).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Activation, Adapter, Options, flat, given, split_scales, unflat, zero_stand_in
from ..kernels import rms
from ..kernels.add import add
from ..kernels.gated import Side, gate_sums
from ..kernels.joint_config import joint_rank
from ..kernels.low_rank import reduce
from ..ops import operators
from ..ops.calls import prepare_backward
from ..ops.triton_parts import float32_precision, product_precision, through
from ..replay.recording import beside_last_launch
from ..replay.stage import stage
from . import reader_kernels
from .norms import NormOrigin, read_by
from .projection import Recipe, as_rows
from .reader_kernels import Gradients, Layer, Parts, combined, gradients_of


def can_run(e: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether ``backward`` takes these layers, with e and f products without a bias."""
    if e.dtype == torch.float16 or e.numel() == 0:  # float16's products lie apart from the outputs
        return False
    for layer in layers:
        if layer.adapter is not None:
            if layer.options.backend != "triton" or layer.adapter.lora_A.shape[0] > joint_rank(e.dtype):
                return False
    down = layers[2]
    return down.adapter is None or down.product is not None or not down.sums()[0]


def backward(
    dy: Tensor,
    x: Tensor | None,
    origin: NormOrigin | None,
    e: Tensor,
    f: Tensor,
    layers: tuple[Layer, Layer, Layer],
    activation: Activation,
    recipe: Recipe | None,
) -> tuple[Tensor | None, list[Gradients]]:
    """dx [..., K], and the gradients of the adapters of gate, up and down, of dy [..., N], x [..., K], e, f [..., I].

    x, or what it was made from; it is made after e, f and dh were read, when memory is free again. Without dropout and
    float16, for ranks up to ``joint_rank``; e and f are products without a bias. ``recipe`` is the forward's, where it
    was one stage.
    """
    dy, e, f = as_rows(dy), e.contiguous(), f.contiguous()
    with operators.context("triton", dy):
        if any(layer.adapter is None for layer in layers):  # whose products are PyTorch's
            dx, gradients = _backward(
                flat(dy), lambda: flat(x if origin is None else origin.output()), flat(e), flat(f), layers, activation,
                Tensor.add_,
            )  # fmt: skip
            return None if dx is None else dx.view(*dy.shape[:-1], dx.shape[1]), gradients
        x, norm_weight, norm = read_by(x, origin)
        tensors: list[Tensor | None] = []
        for i, layer in enumerate(layers):  # of gate and up e and f are the products
            product = layer.product if i == 2 else None
            tensors += (layer.weight, *given(layer.adapter), layer.flat_scales, product, layer.u)
        saved = [t for i in (0, 8, 16) for t in (*tensors[i + 1 : i + 8], tensors[i])]
        together = None if recipe is None else recipe.together
        prepared = prepare_backward(together, dy, (x, norm_weight, e, f, *saved))
        dx, *rest = _joined(
            dy, None if x is None else as_rows(x), norm_weight, e, f, *tensors,
            members=tuple([(layer.options, layer.needs) for layer in layers]), activation=activation, norm=norm,
            precision=float32_precision(recipe is None or recipe.is_wide), prepared=prepared,
        )  # fmt: skip
    return dx, [tuple(rest[i : i + 4]) for i in (0, 4, 8)]


@stage
def _joined(dy, x, norm_weight, e, f, *tensors, members, activation, norm, precision):
    layers = []
    for i, (options, needs) in enumerate(members):
        weight, *adapter, flat_scales, product, u = tensors[8 * i : 8 * i + 8]
        layers.append(Layer(weight, Adapter(*adapter), flat_scales, flat(product), u, options, needs))

    def make_x() -> Tensor | None:
        return flat(x) if norm is None else rms.rms_norm(flat(x), norm_weight, *norm)

    dx, gradients = _backward(flat(dy), make_x, flat(e), flat(f), layers, activation, add, in_a_stage=True)
    return None if dx is None else unflat(dx, dy.shape[:-1]), *[gradient for own in gradients for gradient in own]


def _backward(dy, make_x, e, f, layers, activation, add, in_a_stage=False):
    *readers, down = layers
    precision = product_precision(dy.dtype)
    v: Tensor | None = None
    of_down: Parts = (None, None)
    if down.adapter is None:
        dh = dy @ down.weight.to(dy.dtype)
    else:
        dh, v, dB_parts, S_parts = _down(
            dy, down.weight, *down.adapter, down.flat_scales, down.product, down.u,
            scaling=down.options.scaling, needs_S=down.sums()[0], precision=precision,
        )  # fmt: skip
        of_down = dB_parts, S_parts
    df, *parts = _gate_sums(
        e, f, dh, *[layer.scales().row_scale if layer.adapter is not None else None for layer in readers],
        *[layer.u if layer.needs.lora_B else None for layer in readers], v if down.needs.lora_A else None,
        totals=(
            *[layer.adapter is not None and layer.sums()[0] for layer in readers],
            down.adapter is not None and down.sums()[1],
        ),
        activation=activation, precision=precision,
    )  # fmt: skip
    gradients: list[Gradients] = [(None, None, None, None)] * 3
    if down.adapter is not None and any(down.needs[1:]):
        gradients[2] = _finish(
            down.weight, *down.adapter, down.flat_scales, *of_down, *parts[4:],
            stand_in=zero_stand_in(dy.dtype), **down.keywords(),
        )  # fmt: skip
    of_readers = [dh, df]
    del df, dh
    if in_a_stage and reader_kernels.share_sums(readers, dy.dtype):
        of_rows = [tuple(parts[:2]), tuple(parts[2:4])]
        shared_dx, gradients[:2] = reader_kernels.backward(of_readers, readers, make_x, of_rows, precision)
        return shared_dx, gradients
    x, dx = make_x(), None
    for i, layer in enumerate(readers):
        d = of_readers.pop(0)
        if layer.adapter is not None and any(layer.needs):
            own, *rest = _reader(
                d, x, layer.weight, *layer.adapter, layer.flat_scales, *parts[2 * i : 2 * i + 2],
                precision=precision, **layer.keywords(),
            )  # fmt: skip
            gradients[i] = tuple(rest)
        else:
            own = d @ layer.weight.to(d.dtype) if layer.needs.x else None
        dx = own if dx is None else dx if own is None else add(dx, own)
    return dx, gradients


@stage
def _down(
    dy, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, product, u, *, scaling, needs_S, precision
):
    """dh, v and the parts of dB and S."""
    adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
    scales = split_scales(flat_scales, weight.shape, lora_A.shape[0], adapter.members)
    dh, _, v = through(
        dy, weight, adapter, scales, None, needs_dx=True, needs_D=True, scaling=scaling, precision=precision
    )
    if u is None and not needs_S:
        return dh, v, None, None
    with beside_last_launch():
        parts = reduce(dy, product if needs_S else None, u, scales.cancelled, None, dropout_p=0.0, precision=precision)
    return dh, v, *parts


@stage
def _gate_sums(e, f, dh, scale_e, scale_f, u_e, u_f, v, *, totals, activation, precision):
    """df⊙a_f and the parts of dB_e, S_e, dB_f, S_f, dA_d and D_d; de⊙a_e is written over dh."""
    sides = Side(scale_e, u_e, totals[0]), Side(scale_f, u_f, totals[1]), Side(None, v, totals[2])
    _, df, sums = gate_sums(e, f, dh, sides, activation, precision=precision)
    return df, *sums[0], *sums[1], *sums[2]


@stage
def _finish(
    weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, dB_parts, S_parts, dA_parts, D_parts, *,
    stand_in, **options,
):  # fmt: skip
    """dA, dB, dm_row and dm_col."""
    adapter = Adapter(lora_A, lora_B, magnitude_row, magnitude_col)
    row = combined(adapter, weight, flat_scales, (dB_parts, S_parts), True, options["eps"], stand_in)
    col = combined(adapter, weight, flat_scales, (dA_parts, D_parts), False, options["eps"], stand_in)
    return gradients_of(weight, adapter, flat_scales, row, col, stand_in=stand_in, **options)


@stage
def _reader(
    dy_scaled, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, dB_parts, S_parts, *,
    precision, **options,
):  # fmt: skip
    """dx, dA, dB, dm_row and dm_col of a layer, of dy⊙a."""
    adapter, needs = Adapter(lora_A, lora_B, magnitude_row, magnitude_col), options["needs"]
    members, stand_in = adapter.members, zero_stand_in(dy_scaled.dtype)
    paths = needs.norm_paths(members, Options(1.0, options["norm_order"], options["detach_norm"]))
    needs_D, dx = needs.sums(members, paths)[1], None
    scales = split_scales(flat_scales, weight.shape, lora_A.shape[0], members)
    if needs.x or needs.lora_A or needs_D:
        dx, product, v = through(
            dy_scaled, weight, adapter, scales, None, folded=True, needs_dx=needs.x or needs_D, needs_D=needs_D,
            scaling=options["scaling"], precision=precision,
        )  # fmt: skip
    with beside_last_launch():
        row = combined(adapter, weight, flat_scales, (dB_parts, S_parts), True, options["eps"], stand_in)
    parts: Parts = (None, None)
    if needs.lora_A or needs_D:
        parts = reduce(
            x, product if needs_D else None, v if needs.lora_A else None, scales.cancelled, None,
            dropout_p=0.0, precision=precision,
        )  # fmt: skip
    col = combined(adapter, weight, flat_scales, parts, False, options["eps"], stand_in)
    gradients = gradients_of(weight, adapter, flat_scales, row, col, stand_in=stand_in, **options)
    return dx if needs.x else None, *gradients
