"""The record of all runs: what was done is found again, what is missing is trained, within the time there is."""

from __future__ import annotations

import copy
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .. import measure
from .check import check
from .encoder import Encoder
from .language import LanguageModel
from .tasks import LANGUAGE_TASKS, Sizes, Task, make_task, sizes_of
from .training import RANK, Run, train

_KEY = ("stage", "variant", "task", "method", "rank", "seed", "lr", "magnitude_factor")


class OutOfTime(Exception):
    """The next runs would end after the time that was given."""


@dataclass(frozen=True)
class Cell:
    """Runs of one method on one task for one purpose."""

    stage: str
    task: str
    method: str
    runs: tuple[Run, ...]
    variant: str = ""
    rank: int = RANK


class Session:
    """A file of results that is read, added to after each batch of runs, and never loses one.

    Args:
        path: the JSON file; it is made if it is not there.
        arrays: the prepared data.
        device: to train on.
        minutes: no batch of runs is started that would end later than so many minutes from now; None for no end.
        commit: the sources' commit; None asks git.
        sizes: of a task's training, by its name.
        graph: whether a GPU takes the gradients of a step from a CUDA graph.
    """

    def __init__(
        self,
        path: Path,
        arrays: Mapping[str, np.ndarray],
        device: torch.device,
        minutes: float | None = None,
        commit: str | None = None,
        sizes: Callable[[str], Sizes] = sizes_of,
        graph: bool = True,
    ) -> None:
        self.path, self.arrays, self.device, self.sizes, self.graph = path, arrays, device, sizes, graph
        self.began, self.seconds = time.monotonic(), None if minutes is None else 60 * minutes
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sessions": [], "records": []}
        self.sessions, self.records = content["sessions"], content["records"]
        self.done = {key_of(record) for record in self.records}
        self.sessions.append(measure.environment(device, commit) | {"checks": {}})
        self.models: dict[tuple[str, str], Encoder | LanguageModel] = {}
        self.tasks: dict[str, Task] = {}
        self.pace: dict[tuple[str, str], float] = {}  # seconds of the slowest batch of a model and a method so far

    def run(self, cell: Cell, base_dtype: torch.dtype = torch.float32, watch: Callable | None = None) -> list[dict]:
        """The records of a cell; what is missing is trained first. Raises OutOfTime where no time is left."""

        def train_runs(runs: list[Run]) -> list[dict]:
            model, task = self.model(cell.task, base_dtype), self.task(cell.task)
            return train(model, task, cell.method, runs, rank=cell.rank, watch=watch, graph=self.graph)

        at_once = self.sizes(cell.task).runs_at_once
        if cell.task in LANGUAGE_TASKS and cell.method == "full":  # weights, gradients and moments of every run
            at_once = max(1, at_once // 2)
        return self.run_with(cell, train_runs, at_once)

    def run_with(self, cell: Cell, train_runs: Callable[[list[Run]], list[dict]], at_once: int = 100) -> list[dict]:
        """``run`` with a training of one's own."""
        missing = [run for run in cell.runs if key_of(_identity(cell, run)) not in self.done]
        while missing:
            batch, began = missing[:at_once], time.monotonic()
            self.check_time(self.pace.get(_pace_key(cell), 0.0))
            try:
                new = train_runs(batch)
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once = max(1, min(at_once, len(batch)) // 2)
                print(f"      out of memory: {at_once} runs at once", flush=True)
                torch.cuda.empty_cache()
                continue
            missing = missing[len(batch) :]
            took = time.monotonic() - began
            self.pace[_pace_key(cell)] = max(took, self.pace.get(_pace_key(cell), 0.0))
            self.add([record | _identity(cell, run) for run, record in zip(batch, new, strict=True)], took)
        wanted = {key_of(_identity(cell, run)) for run in cell.runs}
        return [record for record in self.records if key_of(record) in wanted]

    def add(self, records: list[dict], took: float) -> None:
        """Record new runs in the file, and say so."""
        for record in records:
            record["session"] = len(self.sessions) - 1
        self.records += records
        self.done |= {key_of(record) for record in records}
        self.save()
        first, diverged = records[0], sum(record["diverged"] for record in records)
        what = f"{first['stage']} {first['variant']}".strip()
        note = f", {diverged} diverged" if diverged else ""
        print(f"      {what}: {first['task']} {first['method']}, {len(records)} runs, {took:.1f} s{note}", flush=True)

    def save(self) -> None:
        write_runs(self.path, self.sessions, self.records)

    def check_time(self, needed: float) -> None:
        """Raise OutOfTime where a batch that takes so many seconds would end too late."""
        if self.seconds is not None and time.monotonic() - self.began + needed > self.seconds:
            raise OutOfTime

    def each(self, title: str, jobs: list[tuple[str, Callable[[], None]]]) -> bool:
        """Do the jobs in order with a progress bar; False where time ran out, and the rest is for another session."""
        for number, (name, job) in enumerate(jobs):
            filled = 20 * number // len(jobs)
            clock = f"{(time.monotonic() - self.began) / 60:.1f}"
            clock += " min" if self.seconds is None else f" of {self.seconds / 60:g} min"
            bar = f"[{'#' * filled}{'.' * (20 - filled)}]"
            print(f"{bar} {title} {number + 1}/{len(jobs)}: {name}  ({clock})", flush=True)
            try:
                job()
            except OutOfTime:
                print(f"{bar} {title}: out of time, {len(jobs) - number} of {len(jobs)} left; run the same again")
                return False
        print(f"[{'#' * 20}] {title}: complete", flush=True)
        return True

    def model(self, task: str, base_dtype: torch.dtype = torch.float32) -> Encoder | LanguageModel:
        """The model of a task, checked against the package when it is first used."""
        kind = "language" if task in LANGUAGE_TASKS else "encoder"
        if (kind, "torch.float32") not in self.models:
            model = (LanguageModel if kind == "language" else Encoder)(self.arrays, self.device)
            self.models[kind, "torch.float32"] = model
            checked = self.task("bbc_lm" if kind == "language" else "movies")
            began = time.monotonic()
            found = check(shallow(model), checked, self.graph)
            self.sessions[-1]["checks"][kind] = found
            worst = f"largest relative difference {max(found.values()):.1e}, {time.monotonic() - began:.0f} s"
            print(f"      the engine agrees with the package on the {kind}: {worst}", flush=True)
        if (kind, str(base_dtype)) not in self.models:
            model = copy.copy(self.models[kind, "torch.float32"])
            model.weights = {name: weight.to(base_dtype).float() for name, weight in model.weights.items()}
            self.models[kind, str(base_dtype)] = model
        return self.models[kind, str(base_dtype)]

    def task(self, name: str) -> Task:
        if name not in self.tasks:
            self.tasks[name] = make_task(self.arrays, name, self.sizes(name), self.device)
        return self.tasks[name]


def shallow(model: Encoder | LanguageModel, layers: int = 2) -> Encoder | LanguageModel:
    """The first layers, and nothing of the others: what is checked is each kind of layer, not how many there are."""
    model = copy.copy(model)
    model.layers = min(model.layers, layers)
    for part in ("weights", "biases", "tensors"):
        tensors = getattr(model, part)
        numbers = {name: re.findall(r"\.(\d+)\.", name) for name in tensors}
        setattr(model, part, {n: t for n, t in tensors.items() if all(int(i) < model.layers for i in numbers[n])})
    return model


def write_runs(path: Path, sessions: list[dict], records: list[dict]) -> None:
    """Write the file anew; a crash leaves the old one."""
    lines = ",\n".join("  " + json.dumps(record, separators=(",", ":")) for record in records)
    new = path.with_suffix(".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    new.write_text(f'{{"sessions": {json.dumps(sessions, indent=1)},\n"records": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(new, path)


def _identity(cell: Cell, run: Run) -> dict:
    found = {"stage": cell.stage, "variant": cell.variant, "task": cell.task, "method": cell.method, "rank": cell.rank}
    return found | asdict(run)


def key_of(record: Mapping) -> tuple:
    """What tells a run from all others."""
    return tuple(record[name] for name in _KEY)


def _pace_key(cell: Cell) -> tuple[str, str]:
    kind = "language" if cell.task in LANGUAGE_TASKS else "teachers" if cell.stage == "teachers" else "encoder"
    return kind, "full" if cell.method == "full" else "adapter"
