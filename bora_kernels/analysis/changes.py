"""ΔM and ΔD of a weight; their correlation, table and figure over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

AXES = {"row": "output features (rows)", "col": "input features (columns)"}


@dataclass(frozen=True)
class Change:
    """What happened to one weight: ΔM and ΔD by rows (output features) and by columns (input features).

    ``step`` is the optimizer step that made the change, None for a change from the start. ΔM has the weight's unit,
    ΔD is 0 for the same direction, 1 for a right angle, 2 for the opposite.
    """

    layer: str
    step: int | None
    magnitude_row: float
    direction_row: float
    magnitude_col: float
    direction_col: float


@torch.no_grad()
def weight_change(before: Tensor, after: Tensor, layer: str = "", step: int | None = None) -> Change:
    """ΔM and ΔD of one weight, see the head of ``bora_kernels.analysis``.

    Both differences are taken before anything is rounded off: ‖w'‖ − ‖w‖ as (w' − w)·(w' + w) / (‖w'‖ + ‖w‖) and
    1 − cos as ½·‖ŵ' − ŵ‖², which float32 knows to a part in 10⁵ where 1 − cos is lost. A row or column that is zero
    before or after has no direction and counts as not turned.

    Shapes: before, after [N, K]. Dtypes: any floating one; computed in float32, or float64 if one of them is.
    Raises ValueError for other shapes, TypeError for other dtypes.
    """
    for name, weight in (("before", before), ("after", after)):
        if not weight.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {weight.dtype}")
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"{name} must be [N, K] and not empty, got {list(weight.shape)}")
    if before.shape != after.shape:
        raise ValueError(f"after must be {list(before.shape)} as before is, got {list(after.shape)}")
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    before, after, values = before.to(dtype), after.to(dtype), []
    tiny = torch.finfo(dtype).tiny
    for dim in (1, 0):
        old, new = (torch.linalg.vector_norm(weight, dim=dim, keepdim=True) for weight in (before, after))
        grown = ((after - before) * (after + before)).sum(dim, keepdim=True) / (old + new).clamp_min(tiny)
        turn = (after / new.clamp_min(tiny) - before / old.clamp_min(tiny)).square().sum(dim, keepdim=True) / 2
        values += [grown.abs().mean(), torch.where((old > 0) & (new > 0), turn, 0).mean()]
    return Change(layer, step, *torch.stack(values).tolist())


def correlation(changes: Sequence[Change], axis: str) -> float:
    """Pearson's correlation of ΔD and ΔM over layers, within each step, averaged over steps.

    Pooled over steps it would mostly show the schedule of the learning rate. A step in which all layers agree in ΔD or
    in ΔM has none and is passed over.

    Raises ValueError for an axis that is not "row" or "col", and where no step has a correlation.
    """
    _check_axis(axis)
    found = []
    for moved in _by_step(changes, axis).values():
        centred = torch.tensor(moved, dtype=torch.float64).sub_(torch.tensor(moved, dtype=torch.float64).mean(0))
        spread = centred.square().sum(0).sqrt()
        if (spread > 0).all():
            found.append((centred.prod(1).sum() / spread.prod()).item())
    if not found:
        raise ValueError("changes must hold a step in which layers differ in ΔD and in ΔM, got none")
    return sum(found) / len(found)


def plot(changes: Sequence[Change], path: str | PathLike[str]) -> None:
    """Draw ΔD against ΔM to a file: a panel for each axis, a point for each layer, coloured by step.

    Needs matplotlib. Raises ValueError where there is nothing to draw.
    """
    from matplotlib.figure import Figure

    if not changes:
        raise ValueError("changes must not be empty")
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        steps = [change.step or 0 for change in changes]
        points = panel.scatter(*zip(*(_moved(change, axis) for change in changes), strict=True), c=steps, s=14)
        panel.set(xlabel="ΔM, change of magnitude", ylabel="ΔD, change of direction", title=label)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        if any(len(moved) > 2 for moved in _by_step(changes, axis).values()):
            panel.set_title(f"{label}: correlation {correlation(changes, axis):+.2f}")
    if len(set(steps)) > 1:
        figure.colorbar(points, ax=panels, label="step")
    figure.savefig(path, dpi=150)


def table(changes: Sequence[Change]) -> str:
    """The changes as lines of text, with means and correlations over layers below."""
    width = max(len("correlation of dD and dM"), *(len(change.layer) for change in changes))
    columns = [f"{kind}_{axis}" for axis in AXES for kind in ("magnitude", "direction")]
    lines = [f"{'layer':{width}}" + "".join(f"{title:>12}" for title in ("dM row", "dD row", "dM col", "dD col"))]
    lines += [
        f"{change.layer:{width}}" + "".join(f"{getattr(change, column):12.3e}" for column in columns)
        for change in changes
    ]
    means = [sum(getattr(change, column) for change in changes) / len(changes) for column in columns]
    lines.append(f"{'mean':{width}}" + "".join(f"{mean:12.3e}" for mean in means))
    if len(changes) > 2:
        found = "".join(f"{correlation(changes, axis):+24.2f}" for axis in AXES)
        lines.append(f"{'correlation of dD and dM':{width}}{found}")
    return "\n".join(lines)


def _moved(change: Change, axis: str) -> tuple[float, float]:
    return getattr(change, f"magnitude_{axis}"), getattr(change, f"direction_{axis}")


def _by_step(changes: Sequence[Change], axis: str) -> dict[int | None, list[tuple[float, float]]]:
    steps: dict[int | None, list[tuple[float, float]]] = {}
    for change in changes:
        steps.setdefault(change.step, []).append(_moved(change, axis))
    return steps


def _check_axis(axis: str) -> None:
    if axis not in AXES:
        raise ValueError(f"axis must be one of {', '.join(AXES)}, got {axis!r}")
