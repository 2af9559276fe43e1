"""The report: the finding, its contrasts, all scores, what is descriptive, the runs; ``report.md`` and figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import descriptive, figures, score_tables
from .findings import (
    INCOMPLETE,
    NEEDED_TASKS,
    NOT_REPRODUCED,
    REPRODUCED,
    SMALLEST,
    UNDECIDED,
    finding,
    primary_contrasts,
    scores,
    units,
)
from .methods import METHODS, OTHER_CONTRASTS, PRIMARY
from .stages import SMALL, STAGE1_SEEDS, STAGE2_SEEDS
from .statistics import Contrast, Scores, contrasts, pooled_differences, t_interval
from .tables import around, difference, interval, rows, signed
from .tasks import PRIMARY_TASKS, SECONDARY_TASKS, UNITS, methods_of

Table = dict[str, dict[str, Scores]]
Found = dict[tuple[str, str], Contrast]
_VERDICTS = {
    REPRODUCED: "At this scale BoRA gives better models than both rivals: all conditions of the rule hold.",
    NOT_REPRODUCED: f"An interval ends below {SMALLEST} seed standard deviations: against that rival BoRA has no "
    "advantage of a size that would matter at this scale.",
    UNDECIDED: f"Neither do all conditions for an advantage hold, nor does an interval end below {SMALLEST} seed "
    "standard deviations: these runs neither show an advantage of BoRA nor exclude one of a size that would matter.",
    INCOMPLETE: "There is no finding before all primary tasks are complete.",
}


def write(path: Path, folder: Path) -> str:
    """Write ``report.md`` and the figures of a file of runs to ``folder``; returns the text."""
    content = json.loads(path.read_text(encoding="utf-8"))
    records, sessions = content["records"], content["sessions"]
    small = any(session.get("small") for session in sessions)
    seeds1, seeds2 = (STAGE1_SEEDS[: SMALL[0]], STAGE2_SEEDS[: SMALL[1]]) if small else (STAGE1_SEEDS, STAGE2_SEEDS)
    table = scores(records, "score", seeds1, seeds2)
    found = primary_contrasts(table)
    folder.mkdir(parents=True, exist_ok=True)
    others = _other_contrasts(table)
    drawn = [path.name for path in figures.draw(folder, records, table, found, others)]
    parts = [
        "# The study's results",
        "What was compared, on which tasks and by which rule is in [PLAN.md](../PLAN.md), which was committed before "
        "the runs. The first section is the finding; nothing after it decides anything. Scores are of test data; "
        "higher is better. Learning rates were chosen on validation data, for each method and task. *Row* is an output "
        "feature, *column* an input feature.",
        _finding(INCOMPLETE if small else finding(found), table, found, small, drawn),
        score_tables.methods(records, table, drawn),
        score_tables.scores(table, PRIMARY_TASKS, "primary"),
        _others(table, others, drawn),
        descriptive.sensitivity(records, table, drawn),
        score_tables.scores(table, SECONDARY_TASKS, "secondary"),
        descriptive.mechanism(records, drawn),
        descriptive.teachers(records, drawn),
        _by_loss(table, scores(records, "loss", seeds1, seeds2)),
        _runs(records, sessions),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def _finding(verdict: str, table: Table, found: Found, small: bool, drawn: Sequence[str]) -> str:
    lines = [f"## Finding: {verdict}"]
    if small:
        lines.append("**A small run on made-up data: it tests the code and says nothing of the methods.**")
    if not found:
        return "\n\n".join([*lines, "No primary task is complete."])
    if not small:
        lines.append(_VERDICTS[verdict])
    if "contrasts.png" in drawn:
        lines.append("![The primary contrasts, pooled and by task, with intervals](contrasts.png)")
    lines += [
        "Differences are in *seed standard deviations*: a task's difference is divided by how much a score varies from "
        "seed to seed. The pooled contrast is the mean over the tasks. Its interval and p are the plan's; by task the "
        "intervals are of 95 %.",
        _pooled(found),
        _units(table, found),
        _rule(found),
        _seeds_alone(table, found),
    ]
    return "\n\n".join(lines)


def _pooled(found: Found, without_each: bool = True) -> str:
    tasks = list(next(iter(found.values())).tasks)
    lines = [
        [
            difference(pair),
            f"**{signed(c.estimate)}** {interval(c.low, c.high)}",
            f"{100 * c.level:.4g} %",
            f"{c.p:.4f}",
            f"{c.p_holm:.4f}",
            *(f"{signed(c.tasks[t][0])} {interval(*c.tasks[t][1:])}" for t in tasks),
        ]
        for pair, c in found.items()
    ]
    text = rows(["seed standard deviations", "pooled", "level", "p", "p, Holm", *tasks], lines)
    if without_each and len(tasks) > 1:
        without = [[difference(pair), *(signed(c.without[t]) for t in tasks)] for pair, c in found.items()]
        text += "\n\n" + rows(["pooled without", *tasks], without)
    return text


def _units(table: Table, found: Found) -> str:
    unit = units(table)
    return rows(
        ["task", "score", "one seed standard deviation"],
        [[task, UNITS.get(task, "accuracy, %"), f"{unit[task]:.2f}"] for task in next(iter(found.values())).tasks],
        text=2,
    )


def _rule(found: Found) -> str:
    """The plan's conditions, one by one."""
    held = {True: "yes", False: "no"}
    lines = [
        ["reproduced needs: interval above 0", *(held[c.low > 0] for c in found.values())],
        [f"… estimate at least {SMALLEST}", *(held[c.estimate >= SMALLEST] for c in found.values())],
        [
            f"… at least {NEEDED_TASKS} of {len(PRIMARY_TASKS)} tasks positive",
            *(
                f"{held[n >= NEEDED_TASKS]} ({n})"
                for n in (sum(e > 0 for e, *_ in c.tasks.values()) for c in found.values())
            ),
        ],
        [f"not reproduced: interval ends below {SMALLEST}", *(held[c.high < SMALLEST] for c in found.values())],
    ]
    return rows(["the rule", *map(difference, found)], lines)


def _seeds_alone(table: Table, found: Found) -> str:
    """What the intervals would be if the learning rates were given."""
    unit, tasks = units(table), next(iter(found.values())).tasks
    complete = {task: table[task] for task in tasks}
    alone = [f"{difference(pair)}: {around(*t_interval(pooled_differences(complete, pair, unit)))}" for pair in found]
    return (
        "Most of the intervals' width comes from the choice of learning rates on stage 1's few seeds, which the "
        "bootstrap repeats. With the chosen rates taken as given, over the seeds alone (95 %, t, descriptive): "
        f"{'; '.join(alone)}."
    )


def _shared_tasks(table: Table, pair: tuple[str, str]) -> Table:
    """The primary tasks that have both methods, and a unit."""
    unit = units(table)
    return {t: table[t] for t in PRIMARY_TASKS if t in unit and all(method in table[t] for method in pair)}


def _other_contrasts(table: Table) -> Found:
    shared = {pair: _shared_tasks(table, pair) for pair in OTHER_CONTRASTS}
    return {pair: contrasts(own, [pair], units(table))[pair] for pair, own in shared.items() if own}


def _others(table: Table, found: Found, drawn: Sequence[str]) -> str:
    if not found:
        return ""
    lines = []
    for pair, c in found.items():
        own = _shared_tasks(table, pair)
        alone = around(*t_interval(pooled_differences(own, pair, units(table))))
        lines.append([difference(pair), f"{signed(c.estimate)} {interval(c.low, c.high)}", alone, ", ".join(own)])
    head = ["seed standard deviations", "pooled, 95 %", "at the chosen rates, 95 % (t)", "tasks"]
    text = (
        "## Other contrasts (descriptive)\n\nThe first interval counts the choice of learning rates in, the second one "
        "does not. Single runs far from the others, listed above, count in both, and one can move a mean of 24.\n\n"
        f"{rows(head, lines)}"
    )
    return f"{text}\n\n![The other contrasts](others.png)" if "others.png" in drawn else text


def _by_loss(table: Table, by_loss: Table) -> str:
    """The primary contrasts of −100 · test loss, and why their intervals are wide."""
    found = primary_contrasts(by_loss)
    if not found:
        return ""
    unit, lines = units(by_loss), []
    for task in next(iter(found.values())).tasks:
        for method in PRIMARY:
            s = by_loss[task][method]
            near = [i for i in (s.chosen - 1, s.chosen, s.chosen + 1) if 0 <= i < len(s.rates)]
            moved = {s.rates[i]: (s.test[i].mean() - s.test[s.chosen].mean()) / unit[task] for i in near}
            cells = [signed(moved[rate]) if (rate := s.rates[s.chosen] * by) in moved else "" for by in (0.5, 2.0)]
            lines.append([task, METHODS[method].label, f"{unit[task]:.2f}", *cells])
    return (
        "## By test loss in place of the score (descriptive)\n\nThe score here is −100 · test loss of the same runs. "
        "The learning rate is still the one that the score chooses, in the resamples too. Accuracy depends little on "
        "it where the loss depends on it much: an overfitted classifier is as often right, and more sure where it is "
        "wrong. A resample that chooses another rate then moves the loss by several seed standard deviations, and "
        "intervals are as wide as that. Estimates and p are of the chosen rates, and are not touched by it.\n\n"
        f"{_pooled(found, without_each=False)}\n\nHow far stage 1's test loss moves from the chosen learning rate to "
        "half and to twice of it, in seed standard deviations of the loss:\n\n"
        + rows(["task", "method", "1 SD", "half the rate", "twice the rate"], lines, text=2)
    )


def _runs(records: list[dict], sessions: list[dict]) -> str:
    counts = Counter((r["stage"], r["diverged"]) for r in records)
    stages = dict.fromkeys(r["stage"] for r in records)
    lines = [[s, str(counts[s, False] + counts[s, True]), str(counts[s, True])] for s in stages]
    used = [(i, s) for i, s in enumerate(sessions) if any(r["session"] == i for r in records)]
    where = []
    for i, s in used:
        own = [r for r in records if r["session"] == i]
        minutes, worst = f"{sum(r['seconds'] for r in own) / 60:.1f}", _worst(s["checks"])
        where.append([s["date"], s["device"], s["versions"]["torch"], s["commit"], str(len(own)), minutes, worst])
    head = ["started", "device", "PyTorch", "commit", "runs", "minutes", "engine − package, relative"]
    return (
        "## Runs\n\nAll runs are in the file of runs, and all are counted; a diverged one with the score of a model "
        f"that learned nothing.{_not_run(records)}\n\n{rows(['stage', 'runs', 'diverged'], lines)}\n\n"
        + rows(head, where, text=4)
    )


def _not_run(records: list[dict]) -> str:
    """What of the plan has no runs, or not all."""
    stages = {r["stage"] for r in records}
    compared = {(r["task"], r["method"]) for r in records if r["stage"] == "stage2"}
    missing = [name for name in ("sensitivity", "teachers", "mechanism") if name not in stages]
    for method in METHODS:
        tasks = [
            t for t in (*PRIMARY_TASKS, *SECONDARY_TASKS) if method in methods_of(t) and (t, method) not in compared
        ]
        if tasks:
            missing.append(f"stage 2 of {METHODS[method].label}: {', '.join(tasks)}")
    lines = "\n".join(f"- {what}" for what in missing)
    return f"\n\nParts of the plan without runs:\n\n{lines}" if missing else ""


def _worst(checks: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{kind} {max(found.values()):.0e}" for kind, found in checks.items())
