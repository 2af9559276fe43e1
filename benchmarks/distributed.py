"""Steps of a Llama-shaped stack on several devices, under FSDP2 and under tensor parallelism.

    torchrun --nproc-per-node 2 -m benchmarks.distributed                                          # GPUs, by NCCL
    torchrun --nproc-per-node 2 -m benchmarks.distributed --device cpu --layers 2 --length 64      # CPUs, by gloo
    python -m benchmarks.distributed --table benchmarks/results/FILE.json                          # of an earlier run

Strategies: "single" is each device by itself, all at the same time: what the others are compared with. "fsdp" shards
blocks and root, and each device has a batch of its own. "tp" shares one batch: q, k, v, gate and up are sharded over
outputs, o and down over inputs. In the result the strategy is the case's mode.

A provider is timed only after its step was checked: "single" and "tp" against the dense reference by the rule of
``verify``, "fsdp" against what each rank computes alone, gradients averaged. The optimizer is not part of a step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from . import collectives, measure
from .adapting import install
from .cases import Case
from .collectives import average_gradients, gathered, together
from .harness import Harness
from .models import STACKS, Workload
from .providers import PROVIDERS, Provider
from .records import by_case, load, ratio
from .report import number, table
from .sharding import STRATEGIES, ShardedStep
from .verify import References, Result, WrongResult, errors, make_step, named

NAMES = [p.name for p in PROVIDERS if "step" in p.modes and not (p.compiled or p.liger)]
DEFAULT = ["frozen", "peft-lora-half", "peft-dora-half", "fused-bora", "fused-bora-detached"]
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # relative error of "fsdp" against alone: the same operations
TIMEOUT = timedelta(seconds=90)  # a rank that waits longer for another ends the run
CLOCK = "{} at the end of steps that follow one another, the slowest rank's"


class Unsupported(Exception):
    """A peer that does not run under a strategy; says what it raised."""


class Session:
    """One run: the stack, the records, and what is measured of each strategy and provider."""

    def __init__(self, device: torch.device, options: argparse.Namespace) -> None:
        self.device, self.options, self.size = device, options, dist.get_world_size()
        folder = options.results if dist.get_rank() == 0 else None
        self.harness = Harness(device, 0.0, options.steps, options.commit, folder)
        if folder is not None:
            facts = self.harness.environment
            facts["clock"] = CLOCK.format("CUDA events" if device.type == "cuda" else "time.perf_counter")
            facts |= {"device": f"{self.size} × {facts['device']}", "layers": options.layers}
            if device.type == "cuda":
                facts["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        self.mesh = init_device_mesh(device.type, (self.size,))
        self.case = Case("model", "", options.shape, options.batch, options.length, options.rank, options.dtype)
        self.workload = Workload(self.case, device, options.layers)
        self.references = References(self.workload, options.rank)
        torch.manual_seed(1 + dist.get_rank())
        common = self.workload.x, self.workload.dy
        own = tuple(map(torch.randn_like, common))
        self.inputs = {"single": common, "fsdp": own, "tp": common}

    def run(self) -> list[dict]:
        gc.freeze()  # what is imported: garbage is collected often, which takes a quarter of a second otherwise
        providers = {provider.name: provider for provider in PROVIDERS}
        for strategy, name in itertools.product(self.options.strategies, self.options.providers):
            self.measure(replace(self.case, mode=strategy), providers[name])
            if self.device.type == "cuda":
                gc.collect()  # what failed was still held by its traceback when the harness did this
                torch.cuda.empty_cache()
        return self.harness.records

    def measure(self, case: Case, provider: Provider) -> None:
        """Check, time and weigh one provider under one strategy, and record what came out."""
        self.workload.x, self.workload.dy = self.inputs[case.mode]
        record: dict = {}
        try:
            with self.harness.recording(case, provider.name, provider.title) as record:
                record["gpus"] = 1 if case.mode == "single" else self.size
                if problem := provider.problem(self.device, case):
                    raise Unsupported(problem)
                with provider.scope():
                    self._measure(case, provider, record)
        except Unsupported as error:
            record["status"], record["reason"] = "skipped", " ".join(str(error).split())[:300]
            self.harness.write()
        except Exception:
            traceback.print_exc()  # the next one may do better

    def _measure(self, case: Case, provider: Provider, record: dict) -> None:
        own_batch = case.mode == "fsdp"
        if not own_batch:  # what they are made of stays in memory, so they come before it is read
            together(self.references.plain_errors, provider.formula, provider.adapter_dtype(case))
        before = self._allocated()
        alone = together(self._alone, case, provider) if own_batch else None
        step, result = together(self._first_step, case, provider)
        record |= together(self._check, case, provider, result, alone)
        del alone, result
        step.clear()
        model = self._allocated()
        seconds = together(self._time, step)
        median, quartiles = statistics.median(seconds), statistics.quantiles(seconds, n=4)
        tokens = case.tokens / (self.size if case.mode == "tp" else 1)
        record |= {"median": median, "q1": quartiles[0], "q3": quartiles[2], "rounds": len(seconds)}
        record["tokens_per_gpu"] = tokens / median  # in a second
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            record |= {"model_bytes": max(gathered(model - before)), "peak_bytes": max(gathered(peak - model))}
        if case.mode != "single":
            try:
                record |= together(self._communication, case, step)
            except Exception as error:  # of the profiler, say: no reason to lose the time
                record["unmatched"] = f"{type(error).__name__}: {error}"

    def _allocated(self) -> int:
        """Bytes that are allocated now; the most from here on is counted anew."""
        if self.device.type != "cuda":
            return 0
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _alone(self, case: Case, provider: Provider) -> Result:
        """What the provider computes on this rank by itself."""
        root = self.workload.copy(self.workload.root, share=True)
        adapters = install(provider.adapt, root, self.workload, case.rank, provider.adapter_dtype(case))
        self.workload.set_mode(root, training=True, checkpointing=False)
        x = self.workload.x.detach().requires_grad_()
        return named(make_step(root, x, self.workload.dy, adapters, "step")(), adapters)

    def _first_step(self, case: Case, provider: Provider) -> tuple[ShardedStep, Result]:
        try:
            step = ShardedStep(self.workload, provider, case, self.mesh)
            return step, step.result()
        except Exception as error:
            if provider.ours or case.mode == "single" or isinstance(error, torch.OutOfMemoryError):
                raise
            raise Unsupported(f"{type(error).__name__}: {error}") from error

    def _check(self, case: Case, provider: Provider, result: Result, alone: Result | None) -> dict:
        """Hold the first step to its reference; returns by how much it is off."""
        if alone is None:
            return {"error_ratio": self.references.check(result, provider, provider.adapter_dtype(case))}
        found = errors(result, average_gradients(alone))
        wrong = [f"{kind} by {error:.1e}" for kind, error in found.items() if not error <= TOLERANCE[case.dtype]]
        if wrong:  # also for NaN
            allowed = f"allowed is {TOLERANCE[case.dtype]:.0e}"
            raise WrongResult(f"{provider.name} is off what it computes alone: {', '.join(wrong)}; {allowed}")
        return {"errors": found}

    def _time(self, step: Callable) -> list[float]:
        """Seconds of each of several steps, on the slowest rank: from the end of the one before to its own."""
        clock = measure.timer(self.device)
        for _ in range(2):
            step()
        dist.barrier()
        step()
        ticks = [clock()]
        for _ in range(self.options.steps):
            step()
            ticks.append(clock())
        seconds = [end - start for start, end in itertools.pairwise(ticks)]
        return [max(ranks) for ranks in zip(*gathered(seconds), strict=True)]

    def _communication(self, case: Case, step: Callable) -> dict:
        hidden = STACKS[case.shape].hidden

        def kind(collective: str, elements: int) -> str:
            """What a message is; those of tensor parallelism are told apart by their sizes."""
            if case.mode != "tp":
                return collective
            return {case.tokens * hidden: "activations", hidden: "norms"}.get(elements, "factors")

        return collectives.communication(step, self.device, kind)


def markdown(result: dict) -> str:
    """The table of a result, and what became of the goals."""
    environment, rows, goals = result["environment"], [], []
    cases = {key[1]: case for key, case in by_case(result["records"]).items()}
    for strategy, case in cases.items():
        for name, record in case.items():
            row = [strategy, record["title"], str(record.get("gpus", ""))]
            if not record.get("median"):
                rows.append([*row, f"{record['status']}: {record.get('reason', 'not timed')}"])
                continue
            median, messages = record["median"], record.get("messages", {})
            alone = cases.get("single", {}).get(name, {}).get("tokens_per_gpu")
            share = messages.get("norms", {}).get("transfer")
            row += [number(1e3 * median, 2), *(number(ratio(record, case, peer), 2) for peer in ("frozen", "LoRA"))]
            row += [number(record["tokens_per_gpu"] / 1e3, 1)]
            row += [f"{record['tokens_per_gpu'] / alone:.0%}" if alone and strategy != "single" else ""]
            row += [number(record[size] / 2**30, 2) if size in record else "" for size in ("model_bytes", "peak_bytes")]
            row += [", ".join(f"{m['count']} {kind} {m['bytes'] / 1e6:.1f}" for kind, m in messages.items())]
            times = ("communication", "transfer", "exposed")
            row += [number(1e3 * record[time], 2) if time in record else "" for time in times]
            rows.append([*row, f"{1e6 * share:.0f} ({share / median:.2%})" if share is not None else ""])
            if name == "fused-bora" and strategy == "fsdp":
                for peer, limit in (("frozen", 1.2), ("LoRA", 1.0)):
                    goals.append((f"FSDP2 step over {peer}'s", ratio(record, case, peer), f"{limit:.2f}", limit))
            if name == "fused-bora" and share is not None:
                goals.append(("norms' messages over the step", share / median, "0.01", 0.01))
    header = ["strategy", "provider", "GPUs", "ms", "× frozen", "× LoRA", "ktokens/s per GPU", "of single's"]
    header += ["model GiB", "step GiB", "messages of a step, MB", "communication ms", "transfer ms", "exposed ms"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"{environment['device']}; {versions}; commit {environment['commit']}. Clock: {environment['clock']}.",
        table([*header, "norms' messages µs"], rows),
        *(
            f"- {what}: {value:.3f}, at most {text} wanted: {'missed' if value > limit else 'met'}"
            for what, value, text, limit in goals
            if value
        ),
    ]
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def names(allowed):
        def chosen(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(allowed):
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(allowed)}")
            return text.split(",")

        return chosen

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    gpus = torch.cuda.is_available()
    add("--strategies", type=names(STRATEGIES), default=STRATEGIES, help=f"of {', '.join(STRATEGIES)} (default: all)")
    add("--providers", type=names(NAMES), default=DEFAULT, help=f"of {', '.join(NAMES)} (default: {','.join(DEFAULT)})")
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpus else "cpu", help=default)
    add("--shape", choices=STACKS, help="of the stack (default: llama3-8b, on CPUs tiny)")
    add("--layers", type=int, default=8, help=f"decoder blocks {default}")
    add("--batch", type=int, default=4, help=f"sequences in a step, of each rank or for tp of all {default}")
    add("--length", type=int, default=2048, help=f"tokens in a sequence {default}")
    add("--rank", type=int, default=16, help=f"of the adapters {default}")
    add("--dtype", choices=TOLERANCE, help="of the frozen weights and activations (default: bf16, on CPUs fp32)")
    add("--steps", type=int, default=10, help=f"timed steps, at least 2 {default}")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    add("--commit", help="the commit that is measured (default: what git says)")
    add("--table", type=Path, metavar="FILE", help="print the table of this result and measure nothing")
    options = parser.parse_args(arguments)
    options.shape = options.shape or ("llama3-8b" if options.device == "cuda" else "tiny")
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    if options.table is None and "RANK" not in os.environ:
        parser.error("start it with torchrun, as in: torchrun --nproc-per-node 2 -m benchmarks.distributed")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if a provider failed."""
    options = parse(arguments)
    if options.table is not None:
        print(markdown(load(options.table)))
        return 0
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # objects travel by gloo: they need no GPU, and one that has failed cannot hold them up
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        session = Session(device, options)
        failed = any(record["status"] == "failed" for record in session.run())
    finally:
        dist.destroy_process_group()
    if session.harness.path is not None:
        print(markdown(load(session.harness.path)), f"written to {session.harness.path}", sep="\n\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
