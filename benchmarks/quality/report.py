"""The report: the finding, its contrasts, all scores, sensitivity, teachers, mechanism; ``report.md`` and figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from . import figures
from .findings import INCOMPLETE, at_edge, finding, primary_contrasts, scores, units
from .mechanism import METHODS as WATCHED
from .mechanism import correlations
from .methods import METHODS, OTHER_CONTRASTS
from .stages import SMALL, STAGE1_SEEDS, STAGE2_SEEDS, best_of
from .statistics import Contrast, Scores, contrasts, t_interval
from .tasks import PRIMARY_TASKS, SECONDARY_TASKS, UNITS
from .teachers import TEACHERS

Table = dict[str, dict[str, Scores]]
PUBLISHED = {"full": -0.62, "lora": 0.83, "dora": -0.31}  # DoRA, arXiv 2402.09353: query matrices, four checkpoints


def write(path: Path, folder: Path) -> str:
    """Write ``report.md`` and the figures of a file of runs to ``folder``; returns the text."""
    content = json.loads(path.read_text(encoding="utf-8"))
    records, sessions = content["records"], content["sessions"]
    small = any(session.get("small") for session in sessions)
    seeds1, seeds2 = (STAGE1_SEEDS[: SMALL[0]], STAGE2_SEEDS[: SMALL[1]]) if small else (STAGE1_SEEDS, STAGE2_SEEDS)
    table = scores(records, "score", seeds1, seeds2)
    by_loss = scores(records, "loss", seeds1, seeds2)
    found = primary_contrasts(table)
    verdict = INCOMPLETE if small else finding(found)
    parts = [
        "# The study's results\n\nEvery term is explained in `benchmarks/quality/PLAN.md`.",
        _finding(verdict, found, small),
        *(_scores(table, task) for task in (*PRIMARY_TASKS, *SECONDARY_TASKS) if task in table),
        _others(table),
        _pooled("By test loss in place of the score", primary_contrasts(by_loss)),
        _sensitivity(records, table),
        _teachers(records),
        _mechanism(records),
        _runs(records, sessions),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(text, encoding="utf-8")
    figures.draw(folder, records, table, found)
    return text


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _interval(low: float, high: float) -> str:
    return f"[{low:+.2f}, {high:+.2f}]"


def _finding(verdict: str, found: dict[tuple[str, str], Contrast], small: bool) -> str:
    lines = [f"## Finding: {verdict}"]
    if small:
        lines.append("**A small run on made-up data: it tests the code and says nothing of the methods.**")
    if not found:
        return "\n\n".join([*lines, "No primary task is complete."])
    return "\n\n".join([*lines, _pooled("Primary contrasts", found)])


def _pooled(title: str, found: dict[tuple[str, str], Contrast]) -> str:
    if not found:
        return ""
    tasks = list(next(iter(found.values())).tasks)
    rows = [
        [
            f"{METHODS[a].label} − {METHODS[b].label}",
            f"**{c.estimate:+.2f}** {_interval(c.low, c.high)}",
            f"{100 * c.level:.4g} %",
            f"{c.p:.4f}",
            f"{c.p_holm:.4f}",
            *(f"{c.tasks[t][0]:+.2f} {_interval(*c.tasks[t][1:])}" for t in tasks),
        ]
        for (a, b), c in found.items()
    ]
    head = ["seed standard deviations", "pooled", "level", "p", "Holm", *tasks]
    text = f"### {title}\n\n{_rows(head, rows)}"
    if len(tasks) > 1:
        without = [
            [f"{METHODS[a].label} − {METHODS[b].label}", *(f"{c.without[t]:+.2f}" for t in tasks)]
            for (a, b), c in found.items()
        ]
        text += f"\n\n{_rows(['pooled without', *tasks], without)}"
    return text


def _scores(table: Table, task: str) -> str:
    rows = []
    for method, s in table[task].items():
        mean, half = t_interval(s.final)
        edge = " (edge)" if at_edge(s) else ""
        pairs = [""] * 2
        for place, rival in enumerate(("lora_r1", "dora")):
            if rival in table[task] and rival != method:
                difference, width = t_interval(s.final - table[task][rival].final)
                pairs[place] = f"{difference:+.2f} ± {width:.2f}"
        cells = [f"{s.rates[s.chosen]:.2g}{edge}", f"{mean:.2f} ± {half:.2f}", f"{s.final.std(ddof=1):.2f}", *pairs]
        rows.append([METHODS[method].label, *cells])
    seeds = len(next(iter(table[task].values())).final)
    role = "primary" if task in PRIMARY_TASKS else "secondary"
    head = ["method", "learning rate", "test, 95 % (t)", "seed SD", "− LoRA r + 1", "− DoRA detached"]
    return f"## {task} ({role}; {UNITS.get(task, 'accuracy, %')}; {seeds} seeds)\n\n{_rows(head, rows)}"


def _others(table: Table) -> str:
    unit, rows = units(table), []
    for a, b in OTHER_CONTRASTS:
        tasks = [t for t in PRIMARY_TASKS if t in unit and a in table[t] and b in table[t]]
        if tasks:
            c = contrasts({t: table[t] for t in tasks}, [(a, b)], unit)[a, b]
            rows.append(
                [
                    f"{METHODS[a].label} − {METHODS[b].label}",
                    f"{c.estimate:+.2f} {_interval(c.low, c.high)}",
                    ", ".join(tasks),
                ]
            )
    head = ["seed standard deviations", "pooled, 95 %", "tasks"]
    return f"## Other contrasts (descriptive)\n\n{_rows(head, rows)}" if rows else ""


def _sensitivity(records: list[dict], table: Table) -> str:
    """Means over seeds; beside each the difference to stage 2's runs of the same seeds."""
    variants: dict[tuple, list[dict]] = {}
    for r in records:
        if r["stage"] == "sensitivity":
            variants.setdefault((r["variant"], r["task"], r["method"]), []).append(r)
    final = {(r["task"], r["method"], r["seed"]): r["test"] for r in records if r["stage"] == "stage2"}
    rows = []
    for (variant, task, method), found in sorted(variants.items()):
        settings: dict[tuple[float, float], list[dict]] = {}
        for r in found:
            settings.setdefault((r["lr"], r["magnitude_factor"]), []).append(r)
        best = max(settings, key=lambda s: np.mean([r["validation"] for r in settings[s]]))
        several = len({factor for _, factor in settings}) > 1
        for setting, runs in sorted(settings.items()) if several else [(best, settings[best])]:
            paired = [r["test"] - final[task, method, r["seed"]] for r in runs if (task, method, r["seed"]) in final]
            difference, half = t_interval(paired) if len(paired) > 1 else (float("nan"),) * 2
            what = f"{variant}, × {setting[1]:g}" if several else variant
            score = f"{np.mean([r['test'] for r in runs]):.2f}"
            rows.append(
                [what, task, METHODS[method].label, f"{setting[0]:.2g}", score, f"{difference:+.2f} ± {half:.2f}"]
            )
    head = ["variant", "task", "method", "learning rate", "test", "− stage 2, same seeds"]
    return f"## Sensitivity (descriptive)\n\n{_rows(head, rows)}" if rows else ""


def _teachers(records: list[dict]) -> str:
    """The best learning rate's mean share of the difference that was learned."""
    found = teacher_scores(records)
    methods = [m for m in METHODS if any(m in by for by in found.values())]
    rows = [
        [
            METHODS[m].label,
            *(f"{found[t][m][0]:.1f} ± {found[t][m][1]:.1f}" if m in found.get(t, {}) else "" for t in TEACHERS),
        ]
        for m in methods
    ]
    title = "## Teachers: share of a known difference that is learned, %"
    return f"{title}\n\n{_rows(['method', *TEACHERS], rows)}" if rows else ""


def teacher_scores(records: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """{teacher: {method: (mean, half of its 95 % interval)}} at the best learning rate."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    runs: dict[tuple[str, str], list[dict]] = {}
    for r in records:
        if r["stage"] == "teachers":
            runs.setdefault((r["task"], r["method"]), []).append(r)
    for (teacher, method), rows in runs.items():
        grid, best = best_of(rows)
        found.setdefault(teacher, {})[method] = t_interval([r["test"] for r in rows if r["lr"] == grid[best]])
    return found


def _mechanism(records: list[dict]) -> str:
    """Correlations of ΔD and ΔM: by layers within a step or checkpoint, and DoRA's way."""
    rows = []
    for task in PRIMARY_TASKS:
        for method in WATCHED:
            found = correlations(
                [r for r in records if (r["stage"], r["task"], r["method"]) == ("mechanism", task, method)]
            )
            if found:
                cells = [
                    f"{mean:+.2f} ± {half:.2f}" for mean, half in (t_interval(values) for values in found.values())
                ]
                rows.append(
                    [task, METHODS[method].label, *cells, f"{PUBLISHED[method]:+.2f}" if method in PUBLISHED else ""]
                )
                head = ["task", "method", *found, "DoRA's paper"]
    if not rows:
        return ""
    return f"## Correlation of ΔD and ΔM (95 % t over seeds)\n\n{_rows(head, rows)}"


def _runs(records: list[dict], sessions: list[dict]) -> str:
    counts = Counter((r["stage"], r["diverged"]) for r in records)
    stages = dict.fromkeys(r["stage"] for r in records)
    rows = [[s, str(counts[s, False] + counts[s, True]), str(counts[s, True])] for s in stages]
    used = [(i, s) for i, s in enumerate(sessions) if any(r["session"] == i for r in records)]
    seconds = {i: sum(r["seconds"] for r in records if r["session"] == i) for i, _ in used}
    where = [
        [
            s["date"],
            s["device"],
            f"torch {s['versions']['torch']}",
            s["commit"],
            f"{seconds[i] / 60:.1f}",
            _worst(s["checks"]),
        ]
        for i, s in used
    ]
    head = ["started", "device", "version", "commit", "minutes", "engine − package, relative"]
    return f"## Runs\n\n{_rows(['stage', 'runs', 'diverged'], rows)}\n\n{_rows(head, where)}"


def _worst(checks: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{kind} {max(found.values()):.0e}" for kind, found in checks.items())
