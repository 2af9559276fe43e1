"""Tables and charts of results: ``python -m benchmarks.report RESULT.json [RESULT.json ...] [--output DIR]``.

Writes ``report.md`` and, with matplotlib, PNG charts of time and memory; the tables are printed as well. Several
results of one machine and commit are merged, and ``--merged FILE`` keeps the merged result. A case is never put
together from several results, whose ratios would be between processes: the last result that has the case counts. So
split a run by ``--levels`` and ``--cases``, not by ``--providers``.

``BEFORE.json AFTER.json --compare`` prints instead what got slower, and what faster, by more than 5 %. The exit status
is 0 where nothing got slower or was lost, 1 where something did, 2 for files that cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import readme
from .compare import compare
from .records import PEERS, by_case, load, merge, ratio, title, to_json

SUMMARY = (
    "frozen",
    "peft-lora",
    "peft-lora-half",
    "lora-by-hand",
    "lora-by-hand-half",
    "peft-dora",
    "peft-dora-half",
    "dense-bora",
    "dense-bora-compiled",
    "fused-dora",
    "fused-bora",
    "fused-bora-reused",
    "peft-bora",
    "peft-lora-fuse",
    "peft-dora-fuse",
    "fused-bora-fuse",
    "fused-bora-merged",
    "frozen-liger",
    "peft-lora-liger",
    "lora-by-hand-liger",
    "peft-dora-liger",
    "fused-bora-liger",
    "fused-bora-liger-fuse",
)
_NOTES = """\
Time: median of single steps; the clock: {clock}.
"step" is forward and backward, with the gradients of the input and of the adapter; "forward" records a graph;
"inference" runs under `torch.no_grad`. "idle" is the same step launched on an idle device, which waits for the host
until the first kernel; "graph" is it as a CUDA graph, "graph × frozen" over the frozen one's graph.
"after fuse" is a model after `bora_kernels.fuse`; "Liger" one with Liger's RMSNorm, SwiGLU and rotation.
TFLOP/s counts the frozen layer's own products alone, for every provider; "of GEMM" is their share of one
square product measured in the session ({gemm}).
Memory: the most that was allocated at once over what was there before the step (weights, adapter, input and
the output's gradient); gradients are new tensors of the step for every provider.
Ratios: time (memory) over that of the frozen layer, of PEFT's LoRA, of LoRA fused by hand (one autograd function
of matrix products) and of PEFT's DoRA, of two adapter dtypes the better one{dense}. "error" is the largest
error against the exact result over that of the dense reference in the same dtypes; it has to be at most about
2 for this package and 8 for peers, or there is no time."""


def details(key: tuple, case: dict[str, dict], gemm: dict[str, float]) -> str:
    """The table of one case: a row for each provider, also for those that failed or were skipped."""
    header = ["provider", "ms", "idle ms", "graph ms", "ktokens/s", "TFLOP/s", "of GEMM", "peak MiB"]
    header += ["graph × frozen"] + [f"× {peer}" for peer in PEERS] + [f"memory × {peer}" for peer in PEERS] + ["error"]
    rows = []
    for record in case.values():
        if not record.get("median"):
            rows.append([record["title"], f"{record['status']}: {record.get('reason', 'not timed')}"])
            continue
        seconds, speed = record["median"], record.get("flop", 0) / record["median"] / 1e12
        speed_in_tokens, rate = record["batch"] * record["length"] / seconds, gemm.get(record["dtype"])
        rows.append(
            [
                record["title"],
                number(1e3 * seconds, 3),
                *(number(1e3 * record[f], 3) if record.get(f) else "" for f in ("idle_median", "graph_median")),
                number(speed_in_tokens / 1e3, 0 if speed_in_tokens >= 1e5 else 1),
                f"{speed:.3g}" if speed else "",
                f"{speed / rate:.0%}" if rate and speed else "",
                number(record["peak_bytes"] / 2**20, 0) if record.get("peak_bytes") else "",
                number(ratio(record, case, "frozen", "graph_median"), 2),
                *(number(ratio(record, case, peer), 2) for peer in PEERS),
                *(number(ratio(record, case, peer, "peak_bytes"), 2) for peer in PEERS),
                number(record.get("error_ratio"), 2),
            ]
        )
    return f"### {title(key)}\n\n" + table(header, rows)


def summary(cases: dict[tuple, dict[str, dict]], level: str) -> str:
    """One row for each case: ms · MiB of each main provider, and the multiple of the frozen time."""
    shown = {key: case for key, case in cases.items() if key[0] == level and key[1] != "first-call"}
    names = [name for name in SUMMARY if any(case.get(name, {}).get("median") for case in shown.values())]
    if not names:
        return ""
    titles = {name: record["title"] for case in shown.values() for name, record in case.items()}
    rows = []
    for key, case in shown.items():
        cells = []
        for name in names:
            record = case.get(name, {})
            if not record.get("median"):
                cells.append(record.get("status", "–").replace("measured", "–"))
                continue
            cell = number(1e3 * record["median"], 3)
            if record.get("peak_bytes"):
                cell += f" · {record['peak_bytes'] / 2**20:.0f}"
            times = ratio(record, case, "frozen")
            cells.append(cell + (f" ({times:.2f}×)" if times and name != "frozen" else ""))
        graph = case.get("fused-bora", {}).get("graph_median")
        frozen = case.get("frozen", {}).get("median")  # as its users run it
        cells.append(number(graph and 1e3 * graph, 3) + (f" ({graph / frozen:.2f}×)" if graph and frozen else ""))
        rows.append([title(key).removeprefix(f"{level}, "), *cells])
    weighed = any(record.get("peak_bytes") for case in shown.values() for record in case.values())
    caption = f"ms{' · peak MiB' * weighed} (multiple of the frozen time)"
    header = ["case", *(titles[name] for name in names), "FusedBoraLinear as a CUDA graph"]
    return f"## {level.capitalize()}: {caption}\n\n" + table(header, rows)


def markdown(result: dict, charts: Sequence[str] = ()) -> str:
    """The whole report."""
    environment, gemm = result["environment"], result["gemm_tflops"]
    cases = by_case(result["records"])
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    with_peft = any(case.get(name, {}).get("median") for case in cases.values() for name in PEERS["DoRA"][0])
    notes = _NOTES.format(
        clock=environment["clock"],
        gemm=", ".join(f"{dtype} {value:.4g} TFLOP/s" for dtype, value in gemm.items()) or "not measured",
        dense="" if with_peft else " (here the dense DoRA reference: PEFT was not measured)",
    )
    machine = f"{environment['device']}" + (f", {environment['gpu']}" if "gpu" in environment else "")
    parts = [
        f"# Benchmarks, {environment['date']}",
        f"{machine}; {environment['cpu']}; {environment['system']}.\n{versions}; commit {environment['commit']}.",
        *(summary(cases, level) for level in ("layer", "model")),
        *(f"![{Path(name).stem}]({name})" for name in charts),
    ]
    parts += ["## Every case", notes]
    for key, case in cases.items():
        if key[1] != "first-call":
            parts.append(details(key, case, gemm))
            continue
        for record in case.values():
            text = f"{record['first']:.2f} s, the second {1e3 * record['second']:.1f} ms" if "first" in record else ""
            parts.append(f"### {title(key)}\n\n{record['title']}: {text or record.get('reason', 'failed')}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def number(value: float | None, digits: int) -> str:
    """A cell of a table: the value with so many decimals, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; rows may end early, and columns without a value are left out."""
    full = [row + [""] * (len(header) - len(row)) for row in rows]
    used = [i for i in range(len(header)) if i == 0 or any(row[i] for row in full)]
    lines = [
        [header[i] for i in used],
        ["---"] + ["---:"] * (len(used) - 1),
        *([row[i] for i in used] for row in full),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that pytest benchmarks wrote")
    parser.add_argument("--output", type=Path, help="folder to write to (default: beside the first, with its name)")
    parser.add_argument("--merged", type=Path, help="file to write the merged result to")
    parser.add_argument("--readme", type=Path, help="only write the table of this README anew")
    parser.add_argument(
        "--compare", action="store_true", help="only say what changed from the first result to the second"
    )
    options = parser.parse_args(arguments)
    if options.compare:
        return _compare(options.results)
    try:
        if options.readme is not None:
            readme.write(options.readme, options.results)
            return 0
        result = merge([load(path) for path in options.results])
        folder = options.output or (options.merged or options.results[0]).with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        if options.merged is not None:
            options.merged.write_text(to_json(result), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        from .charts import draw

        charts = draw(result, folder)
    except ImportError:
        charts = []
        print("no charts: matplotlib is not installed", file=sys.stderr)
    text = markdown(result, charts)
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(text, end="")
    print(f"written to {folder}: report.md {' '.join(charts)}", file=sys.stderr)
    return 0


def _compare(paths: list[Path]) -> int:
    try:
        if len(paths) != 2:
            raise ValueError(f"--compare must have two results, got {len(paths)}")
        found = compare(*map(load, paths))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found)
    return 1 if found.slower or found.lost else 0


if __name__ == "__main__":
    sys.exit(main())
