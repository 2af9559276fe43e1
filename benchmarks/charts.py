"""PNG charts of a result: time and memory against tokens, rank and width, and of the models."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .records import by_case, title

_COLORS = {
    "frozen": "#7f7f7f",
    "peft-lora": "#56b4e9",
    "peft-lora-half": "#0072b2",
    "peft-dora": "#f0c987",
    "peft-dora-half": "#e69f00",
    "dense-bora": "#009e73",
    "dense-bora-compiled": "#66c2a5",
    "fused-dora": "#cc79a7",
    "fused-bora": "#d62728",
}


def draw(result: dict, folder: Path) -> list[str]:
    """Charts of the layer's step against tokens, rank and width, and of the models; returns the files' names."""
    measured = [record for record in result["records"] if record.get("median") and record["provider"] in _COLORS]
    steps = [record for record in measured if record["level"] == "layer" and record["mode"] == "step"]
    axes_of = {
        "tokens": (lambda r: r["batch"] * r["length"], ("shape", "rank", "dtype")),
        "rank": (lambda r: r["rank"], ("shape", "batch", "length", "dtype")),
        "width": (_width, ("batch", "length", "rank", "dtype")),
    }
    files = []
    for axis, (value, same) in axes_of.items():
        groups: dict[tuple, list[dict]] = {}
        for record in steps:
            if value(record) is not None:
                groups.setdefault(tuple(record[field] for field in same), []).append(record)
        group = max(groups.values(), key=lambda g: len({value(record) for record in g}), default=[])
        if len({value(record) for record in group}) < 2:
            continue
        fixed = [f"{n} {group[0][n]}" for n in same if n not in ("batch", "length")]
        fixed += [f"{group[0]['batch'] * group[0]['length']} tokens"] * ("length" in same)
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        panels = _panels(figure, group, f"layer, forward and backward, {', '.join(fixed)}")
        for panel, field, scale in panels:
            for name in _COLORS:
                points = sorted((value(r), r[field] * scale) for r in group if r["provider"] == name and r[field])
                if points:
                    panel.plot(*zip(*points, strict=True), marker="o", color=_COLORS[name], label=name)
            ticks = sorted({value(record) for record in group})
            panel.set(xlabel=axis, xscale="log", yscale="log")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            panel.minorticks_off()
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.savefig(folder / f"{axis}.png", dpi=110)
        files.append(f"{axis}.png")
    return files + _draw_models([record for record in measured if record["level"] == "model"], folder)


def _draw_models(records: list[dict], folder: Path) -> list[str]:
    cases = by_case(records)
    if not cases:
        return []
    figure = Figure(figsize=(11, 1.2 + 0.16 * len(records)), layout="constrained")
    panels = _panels(figure, records, "four Llama-shaped layers")
    for panel, field, scale in panels:
        position, ticks = 0.0, []
        for key, case in cases.items():
            start = position
            for name, record in case.items():
                if record[field]:
                    panel.barh(position, record[field] * scale, color=_COLORS[name], label=name)
                position += 1
            ticks.append(((start + position - 1) / 2, title(key).removeprefix("model, ")))
            position += 1
        panel.set_yticks([y for y, _ in ticks], [text.replace(": ", "\n") for _, text in ticks], fontsize=8)
        panel.invert_yaxis()
    handles, labels = panels[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside right center", frameon=False)
    figure.savefig(folder / "models.png", dpi=110)
    return ["models.png"]


def _panels(figure, records: list[dict], headline: str) -> list[tuple]:
    """Axes for time and, where it was measured, for memory."""
    fields = [("median", 1e3, "ms")]
    fields += [("peak_bytes", 2**-20, "peak MiB")] if any(record["peak_bytes"] for record in records) else []
    figure.suptitle(headline, fontsize=11)
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    for panel, (_, _, label) in zip(axes, fields, strict=True):
        panel.set_title(label, fontsize=10)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return [(panel, field, scale) for panel, (field, scale, _) in zip(axes, fields, strict=True)]


def _width(record: dict) -> int | None:
    out_features, in_features = record["shape"].split("x")
    return int(out_features) if out_features == in_features else None
