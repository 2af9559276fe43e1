"""One measurement: adapt, check, time, weigh; and the record of a session."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bora_kernels import FusedBoraLinear

from . import measure
from .adapting import install
from .cases import DTYPES, Case
from .models import Workload
from .providers import Provider
from .records import to_json
from .verify import References, make_step, named

_ROUNDS_OF_MODELS = 7  # at least: a step takes so long that little else disturbs it


class Harness:
    """A session: the device, the present workload, and a record for each case and provider."""

    def __init__(
        self, device: torch.device, budget: float, least_rounds: int, commit: str | None, folder: Path | None = None
    ) -> None:
        self.device, self.budget, self.least_rounds, self.commit = device, budget, least_rounds, commit
        self.folder = folder  # where the session's file goes
        self.path: Path | None = None  # the file
        self.records: list[dict] = []
        self.gemm: dict[str, float] = {}
        self._key: tuple | None = None
        self._loaded: tuple[Workload, References] | None = None

    def measure(self, case: Case, provider: Provider, benchmark) -> None:
        """Check the provider on the case, time it with the benchmark fixture, and record what came out.

        A provider that cannot run here is skipped; one that gives a wrong result fails and is not timed.
        """
        with self.recording(case, provider.name, provider.title) as record:
            if problem := provider.problem(self.device, case):
                record["status"], record["reason"] = "skipped", problem
                benchmark.skipped = True
                pytest.skip(problem)
            self._measure(case, provider, benchmark, record)

    @contextlib.contextmanager
    def recording(self, case: Case, provider: str, title: str) -> Iterator[dict]:
        """A new record, which says in the end whether it was measured."""
        record = {**asdict(case), "provider": provider, "title": title, "status": "interrupted"}
        self.records.append(record)
        try:
            yield record
            record["status"] = "measured"
        except Exception as error:
            record["status"] = "failed"
            record.pop("median", None)  # what failed has no time
            record["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise
        finally:
            gc.collect()  # the step is gone, its modules may be in cycles
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.write()

    def _measure(self, case: Case, provider: Provider, benchmark, record: dict) -> None:
        workload, references = self.load(case)
        root = workload.copy(workload.root, share=True)
        adapters = install(provider.adapt, root, workload, case.rank, provider.adapter_dtype(case))
        workload.set_mode(root, training=case.mode != "inference", checkpointing=case.checkpointing)
        if provider.merged:
            for layer in root.modules():
                if isinstance(layer, FusedBoraLinear):
                    layer.merge()
        module, x, dy = workload.callable(root), workload.x.detach().requires_grad_(), workload.dy
        step = make_step(module, x, dy, adapters, case.mode)

        with provider.scope():
            step()
            result = named(step(), adapters)
        record["error_ratio"] = round(references.check(result, provider, provider.adapter_dtype(case)), 3)
        del result
        with provider.scope():
            self._time(benchmark, step, case, record)
            record["peak_bytes"] = measure.peak_bytes(step, self.device)
            if provider.graphed and case.graphed and self.device.type == "cuda":
                self._time_graph(step, record)
        record["flop"] = workload.forward_flop * (2 if case.mode == "step" else 1)
        record["adapter_dtype"] = str(provider.adapter_dtype(case)).removeprefix("torch.")
        benchmark.extra_info.update({name: record[name] for name in ("peak_bytes", "error_ratio", "flop")})

    def load(self, case: Case) -> tuple[Workload, References]:
        """What the case computes on, and its references, each kept until another one is asked for."""
        if self._loaded is None or self._key != case.workload:
            self._loaded = None  # free them before the next ones are made
            workload = Workload(case, self.device)
            self._loaded = workload, References(workload, case.rank)
            self._key = case.workload
            if case.dtype not in self.gemm:
                self.gemm[case.dtype] = round(measure.gemm_tflops(self.device, DTYPES[case.dtype]), 3)
        return self._loaded

    def _time(self, benchmark, step, case: Case, record: dict) -> None:
        setup = measure.behind_another(step, self.device)
        seconds = measure.warm_up(step, self.device, setup)
        least = self.least_rounds if case.level == "layer" else min(self.least_rounds, _ROUNDS_OF_MODELS)
        rounds = measure.rounds_for(seconds, self.budget, least)
        benchmark.pedantic(step, setup=setup, rounds=rounds)
        if benchmark.stats is not None:  # None under --benchmark-disable
            stats = benchmark.stats.stats
            names = ("median", "min", "q1", "q3", "rounds")
            record.update({name: _significant(getattr(stats, name)) for name in names})
        if self.device.type == "cuda" and case.graphed:  # elsewhere the host is not waited for
            setup = measure.on_idle_device(self.device)
            seconds = measure.median_seconds(step, self.device, setup, self.budget / 3, least=3)
            record["idle_median"] = _significant(seconds)

    def _time_graph(self, step, record: dict) -> None:
        try:
            record["graph_median"] = _significant(measure.graph_seconds(step, self.device, self.budget / 3))
        except RuntimeError as error:  # what cannot be captured is no reason to lose the eager time
            record["graph_error"] = str(error).splitlines()[0][:200]
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self.device)

    @functools.cached_property
    def environment(self) -> dict:
        return measure.environment(self.device, self.commit)

    def write(self) -> None:
        """Write all records to the session's file, after each of them: a session that is cut off loses one."""
        if self.folder is None:
            return
        self.path = self.path or self._new_path(self.folder)
        partial = self.path.with_suffix(".partial")
        result = {"environment": self.environment, "gemm_tflops": self.gemm, "records": self.records}
        partial.write_text(to_json(result), encoding="utf-8")
        partial.replace(self.path)

    def _new_path(self, folder: Path) -> Path:
        name = re.sub(r"[^a-z0-9]+", "-", str(self.environment["device"]).lower()).strip("-")
        stamp = re.sub(r"[^0-9]+", "-", str(self.environment["date"])).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        names = (f"{stamp}-{name}{f'-{number}' * (number > 1)}.json" for number in itertools.count(1))
        return next(path for path in map(folder.joinpath, names) if not path.exists())


def _significant(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
