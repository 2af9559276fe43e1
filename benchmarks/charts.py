"""PNG charts of a result: the layer over tokens as lines; ranks, shapes and models as bars with their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator

from .records import by_case

# What a chart calls a provider, and its colour, from the frozen layer to this package's.
_NAMES = {
    "frozen": ("frozen {level}", "#8c8c8c"),
    "peft-lora": ("PEFT LoRA, fp32 adapter", "#9ccbea"),
    "peft-lora-half": ("PEFT LoRA, {dtype} adapter", "#2f7fb8"),
    "lora-by-hand": ("LoRA by hand, fp32 adapter", "#b9b3dc"),
    "lora-by-hand-half": ("LoRA by hand, {dtype} adapter", "#6a5fb0"),
    "peft-dora": ("PEFT DoRA, fp32 adapter", "#f3d19b"),
    "peft-dora-half": ("PEFT DoRA, {dtype} adapter", "#d98f0b"),
    "dense-bora": ("BoRA, dense formula", "#7fc0a4"),
    "dense-bora-compiled": ("BoRA, dense, torch.compile", "#3c9a76"),
    "fused-dora": ("FusedDoraLinear, detached", "#d9746a"),
    "fused-bora": ("FusedBoraLinear", "#b3201c"),
    "peft-lora-fuse": ("PEFT LoRA after fuse", "#c98bb8"),
    "peft-dora-fuse": ("PEFT DoRA after fuse", "#a3478d"),
    "fused-bora-fuse": ("FusedBoraLinear after fuse", "#6d1560"),
    "frozen-liger": ("frozen {level}, Liger", "#bdbdbd"),
    "lora-by-hand-liger": ("LoRA by hand, {dtype} adapter, Liger", "#8f86cf"),
    "fused-bora-liger": ("FusedBoraLinear, Liger", "#cf5a52"),
    "fused-bora-liger-fuse": ("after fuse, Liger's rotation", "#8d4a86"),
}
_LINES = ("frozen", "peft-lora-half", "lora-by-hand-half", "peft-dora-half", "fused-bora")
_FIELDS = (("median", 1e3, "ms", "time of a step"), ("peak_bytes", 2**-20, "MiB", "peak memory of a step"))
_MODELS = {
    "llama3-8b": "Four layers of Llama-3-8B",
    "qwen2.5-7b": "Four layers of Qwen2.5-7B",
    "gemma2-9b": "Four layers of Gemma-2-9B",
    "tiny": "Four layers of a tiny Llama",
    "tiny-qwen2": "Four layers of a tiny Qwen2",
    "tiny-gemma2": "Four layers of a tiny Gemma-2",
}
_LIBRARIES = {"torch": "PyTorch", "triton": "Triton", "peft": "PEFT"}


def draw(result: dict, folder: Path) -> list[str]:
    """Charts of the layer's step over tokens, ranks and shapes, and of the models; returns the files' names."""
    measured = [record for record in result["records"] if record.get("median") and record["provider"] in _NAMES]
    steps = [record for record in measured if (record["level"], record["mode"]) == ("layer", "step")]
    models = [record for record in measured if (record["level"], record["mode"]) == ("model", "step")]
    few = [record for record in steps if not record["provider"].startswith("dense")]
    charts = {
        "tokens.png": _lines(_widest(steps, _tokens, ("shape", "rank", "dtype"))),
        "rank.png": _bars(
            _widest(few, _rank, ("shape", "batch", "length", "dtype")), _rank, lambda record: record["rank"]
        ),
        "shape.png": _bars(_widest(few, _shape, ("batch", "length", "rank", "dtype")), _shape, _weights),
        "models.png": _bars(models, _model),
    }
    for name, figure in charts.items():
        if figure is not None:
            _entitle(figure, result["environment"])
            figure.savefig(folder / name, dpi=130)
    return [name for name, figure in charts.items() if figure is not None]


def _tokens(record: dict) -> int:
    return record["batch"] * record["length"]


def _rank(record: dict) -> str:
    return f"r = {record['rank']}"


def _shape(record: dict) -> str:
    return record["shape"].replace("x", " × ") + " (out × in)"


def _weights(record: dict) -> int:
    out_features, in_features = record["shape"].split("x")
    return int(out_features) * int(in_features)


def _model(record: dict) -> str:
    base = "" if record["base"] == "dense" else f", {record['base'].upper()} base"
    checkpointed = ", checkpointed" if record["checkpointing"] else ""
    return f"{_MODELS[record['shape']]}, {record['batch']} × {record['length']} tokens{base}{checkpointed}"


def _widest(records: list[dict], value, same: tuple[str, ...]) -> list[dict]:
    """The records that agree in ``same`` and have the most values; none where there are fewer than two values."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[field] for field in same), []).append(record)
    widest = max(groups.values(), key=lambda group: len({value(record) for record in group}), default=[])
    return widest if len({value(record) for record in widest}) > 1 else []


def _lines(records: list[dict]) -> Figure | None:
    """Time and memory of five providers over tokens, each line with its name and its numbers."""
    if not records:
        return None
    fields = _measured_fields(records)
    figure = Figure(figsize=(1.0 + 5.2 * len(fields), 4.6), layout="constrained")
    one = records[0]
    figure.suptitle(f"A linear layer of {_shape(one)}, forward and backward, r = {one['rank']}, {one['dtype']} base")
    for axes, (field, scale, unit, label) in zip(
        figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True
    ):
        lines = {
            name: dict(sorted((_tokens(r), r[field] * scale) for r in records if r["provider"] == name and r[field]))
            for name in _LINES
        }
        for width, (name, points) in enumerate(lines.items()):  # from wide to narrow: none hides another
            text, color = _NAMES[name]
            style = {"markersize": 9 - 1.5 * width, "linewidth": 3 - 0.5 * width}
            axes.plot(points.keys(), points.values(), "o-", color=color, label=text.format(**one), **style)
        ticks = sorted({_tokens(record) for record in records})
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=f"{label}, {unit}")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 2.2)
        axes.grid(color="0.92")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.draw_without_rendering()  # now it is known where the points lie
    for axes in figure.axes:
        _number_points(axes)
    return figure


def _number_points(axes: Axes) -> None:
    """Each point's number to its right, those of one x at least a line apart."""
    points_per_pixel = 72 / axes.figure.dpi
    columns: dict[float, list[tuple]] = {}
    for line in axes.lines:
        for x, y in np.asarray(line.get_xydata()):
            height = axes.transData.transform((x, y))[1] * points_per_pixel
            columns.setdefault(x, []).append((height, y, line.get_color()))
    for x, column in columns.items():
        top = float("-inf")
        for height, y, color in sorted(column):
            top = max(height, top + 9)
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": color}
            outline = [withStroke(linewidth=3, foreground="white")]  # legible over a line
            axes.annotate(_digits(y), (x, y), (7, top - height), path_effects=outline, **style)


def _bars(records: list[dict], group_of, order=None) -> Figure | None:
    """A row of panels for each group, a named bar with its number for each provider in it."""
    groups: dict[str, list[dict]] = {}
    for case in by_case(sorted(records, key=order) if order else records).values():
        for name in _NAMES:
            if name in case:
                groups.setdefault(group_of(case[name]), []).append(case[name])
    if not groups:
        return None
    fields, rows = _measured_fields(records), [len(group) for group in groups.values()]
    figure = Figure(figsize=(2.2 + 4.2 * len(fields), 1.0 + 0.25 * sum(rows) + 0.45 * len(rows)), layout="constrained")
    one = records[0]
    if one["level"] == "model":
        figure.suptitle(f"Model, forward and backward, r = {one['rank']}, {one['dtype']}")
    else:
        same = [_shape(one) if group_of is _rank else _rank(one), f"{_tokens(one):,} tokens", f"{one['dtype']} base"]
        figure.suptitle(f"A linear layer, forward and backward: {', '.join(same)}")
    panels = figure.subplots(len(rows), len(fields), squeeze=False, height_ratios=[n + 1 for n in rows])
    for row, (text, group) in enumerate(groups.items()):
        frozen = next((record for record in group if record["provider"] == "frozen"), None)
        for axes, (field, scale, unit, label) in zip(panels[row], fields, strict=True):
            values = [(record[field] or 0) * scale for record in group]
            bars = axes.barh(range(len(group)), values, color=[_NAMES[record["provider"]][1] for record in group])
            numbers = [f"{_digits(value)} {unit}" if value else "–" for value in values]
            if frozen and frozen[field]:
                multiples = [value / (frozen[field] * scale) for value in values]
                numbers = [f"{n} ({m:.2f}×)" if m not in (0, 1) else n for n, m in zip(numbers, multiples, strict=True)]
            axes.bar_label(bars, numbers, padding=3, fontsize=8)
            names = [_NAMES[record["provider"]][0].format(**record) for record in group]
            axes.set_yticks(range(len(group)), names if axes is panels[row, 0] else [], fontsize=8)
            axes.set(xlim=(0, 1.45 * max(values)), xticks=[])
            heading = f"{label} (multiple of the frozen one)\n\n" if row == 0 else ""
            axes.set_title(heading + text * (axes is panels[row, 0]), fontsize=9, loc="left")
            axes.tick_params(left=False)
            axes.invert_yaxis()
            axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def _entitle(figure: Figure, environment: dict) -> None:
    """The figure's title, and below it on what and with which versions it was measured."""
    versions = environment["versions"]
    known = [f"{name} {versions[key]}" for key, name in _LIBRARIES.items() if key in versions]
    figure.suptitle(
        figure.get_suptitle() + "\n" + ", ".join([environment["device"], *known, environment["date"]]), fontsize=10
    )


def _measured_fields(records: list[dict]) -> list[tuple]:
    return [field for field in _FIELDS if any(record.get(field[0]) for record in records)]


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
