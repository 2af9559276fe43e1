"""The layer beside LoRA fused by hand over tokens, widths and ranks: ``pytest benchmarks --sweep``.

A layer is judged by its worst case, not by the shape that a kernel was tuned for: widths of four families of models,
and numbers of tokens that are no powers of two among them. Frozen layer, LoRA by hand and BoRA run in one process, and
no time counts whose result was not held to the reference in the same run. On CUDA a ratio is one of times of CUDA
graphs, which are the device's alone; that of the eager steps stands beside it.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from math import inf
from typing import Any, NamedTuple

import torch

import bora_kernels

from . import measure
from .adapting import install
from .cases import DTYPES, Case
from .harness import Harness
from .providers import PROVIDERS, Provider
from .records import CASE_FIELDS, by_case, title
from .verify import make_step, named

WIDTHS = {  # out x in features of q, k, gate and down
    "Llama-3-8B": ("4096x4096", "1024x4096", "14336x4096", "4096x14336"),
    "Qwen2.5-7B": ("3584x3584", "512x3584", "18944x3584", "3584x18944"),
    "Gemma-2-9B": ("4096x3584", "2048x3584", "14336x3584", "3584x14336"),
    "Llama-3.2-1B": ("2048x2048", "512x2048", "8192x2048", "2048x8192"),
}
_CUDA = (
    [shape for shapes in WIDTHS.values() for shape in shapes],
    [512, 1000, 1024, 1500, 2048, 3000, 5000, 6144, 7001, 8192, 12288, 16384],
    [4, 8, 16, 32, 64, 128, 256],
)
_CPU = (["96x64", "64x160"], [48, 67], [4, 16])
_RANK, _TOKENS = 16, 8192  # every number of tokens is measured at this rank, every rank at this number of tokens
_HALF_RANKS = (64, 256)  # with adapters in the base's dtype as well
_LEAST_SECONDS = 40e-6  # of a frozen step that is judged; below it is what launches cost
FROZEN, BY_HAND, OURS, OURS_HALF = "frozen", "lora-by-hand", "fused-bora", "fused-bora-half"


class Band(NamedTuple):
    """Cases that are judged together: ranks and tokens from, to, and the most that BoRA over LoRA may be."""

    name: str
    ranks: tuple[int, int]
    tokens: tuple[float, float]
    limit: float | None
    half: bool = False


_MANY = (6000, inf)
BANDS = (
    Band("r = 16, 6,000 tokens and more", (16, 16), _MANY, 1.12),
    Band("r = 16, 3,000 to 5,999 tokens", (16, 16), (3000, 5999), 1.20),
    Band("r = 16, 2,000 to 2,999 tokens", (16, 16), (2000, 2999), 1.40),
    Band("r = 16, 1,000 to 1,999 tokens", (16, 16), (1000, 1999), 1.65),
    Band("r = 16, up to 999 tokens", (16, 16), (0, 999), 1.90),
    Band("r up to 32, 6,000 tokens and more", (1, 32), _MANY, 1.12),
    Band("r = 33 to 64, 6,000 tokens and more", (33, 64), _MANY, 1.18),
    Band("r = 65 to 128, 6,000 tokens and more", (65, 128), _MANY, 1.30),
    Band("r above 128, 6,000 tokens and more", (129, 512), _MANY, 1.45),
    Band("half-precision adapter, r up to 64, 6,000 tokens and more", (1, 64), _MANY, 1.12, half=True),
    Band("half-precision adapter, r above 64, 6,000 tokens and more", (65, 512), _MANY, 1.30, half=True),
    Band("all others", (1, 512), (0, inf), None),
    Band("half-precision adapter, all others", (1, 512), (0, inf), None, half=True),
)


def cases(
    device: str,
    *,
    shapes: list[str] | None = None,
    tokens: list[int] | None = None,
    ranks: list[int] | None = None,
    dtypes: list[str] | None = None,
) -> list[Case]:
    """All tokens at rank 16 and all ranks at 8192 tokens, or the product of those that are given, in mixed order.

    So a sweep whose time runs out has seen some of everything. The order is the same in every run.
    """
    own = _CUDA if device == "cuda" else _CPU
    pairs = [
        (count, rank)
        for count in tokens or own[1]
        for rank in ranks or own[2]
        if tokens or ranks or device != "cuda" or count == _TOKENS or rank == _RANK
    ]
    found = [
        Case("layer", "step", shape, 1, count, rank, dtype)
        for dtype in dtypes or ["bf16" if device == "cuda" else "fp32"]
        for shape in shapes or own[0]
        for count, rank in pairs
    ]
    random.Random(0).shuffle(found)
    return found


def providers(case: Case) -> list[Provider]:
    """Frozen layer, LoRA by hand with adapters in the base's dtype, BoRA with float32 adapters, at some ranks both."""
    names = [FROZEN, BY_HAND if case.dtype == "fp32" else f"{BY_HAND}-half", OURS]
    names += [OURS_HALF] * (case.rank in _HALF_RANKS and case.dtype != "fp32")
    return [provider for name in names for provider in PROVIDERS if provider.name == name]


def run(harness: Harness, chosen: list[Case], minutes: float | None) -> Iterator[Case]:
    """Measure the cases that the harness has no records of yet, and hand out each when it is done.

    Ends early where the time is over, so that what is left is for another run.
    """
    began = time.monotonic()
    if harness.device.type == "cuda":
        compile_kernels(chosen, harness.device)
    gc.freeze()  # or each measurement's collection would look through all that was imported
    try:
        for case in chosen:
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                return
            for provider in providers(case):
                with contextlib.suppress(Exception), harness.recording(case, provider.name, provider.title) as record:
                    _measure(harness, case, provider, record)  # an error is in the record; the next case may do
            yield case
    finally:
        gc.unfreeze()


def left(harness: Harness, chosen: Iterable[Case]) -> list[Case]:
    """The cases that the harness has not all records of."""
    done = {_key(record) + (record["provider"],) for record in harness.records}
    return [case for case in chosen if any(_key(asdict(case)) + (p.name,) not in done for p in providers(case))]


def _key(case: dict) -> tuple:
    return tuple(case[field] for field in CASE_FIELDS)


def compile_kernels(chosen: list[Case], device: torch.device) -> None:
    """The kernels of all cases, side by side, so that none is compiled between measurements."""
    by_layer: dict[tuple[str, int, str], list[int]] = {}
    for case in chosen:
        by_layer.setdefault((case.shape, case.rank, case.dtype), []).append(case.length)
    by_tokens: dict[tuple[int, ...], list[torch.nn.Module]] = {}
    for (shape, rank, dtype), lengths in by_layer.items():
        out_features, in_features = map(int, shape.split("x"))
        for half in (False, True)[: 1 + (rank in _HALF_RANKS)]:
            layer = bora_kernels.FusedBoraLinear(
                in_features, out_features, rank, bias=False, device=device, dtype=DTYPES[dtype],
                adapter_dtype=DTYPES[dtype] if half else torch.float32,
            )  # fmt: skip
            by_tokens.setdefault(tuple(sorted(lengths)), []).append(layer)
    for lengths_of, layers in by_tokens.items():
        bora_kernels.warm_up(torch.nn.ModuleList(layers).train(), lengths_of)


def _measure(harness: Harness, case: Case, provider: Provider, record: dict) -> None:
    workload, references = harness.load(case)
    root = workload.copy(workload.root, share=True)
    dtype = provider.adapter_dtype(case)
    adapters = install(provider.adapt, root, workload, case.rank, dtype)
    workload.set_mode(root, training=True, checkpointing=False)
    x = workload.x.detach().requires_grad_()
    step = make_step(workload.callable(root), x, workload.dy, adapters, case.mode)
    step()
    record["error_ratio"] = round(references.check(named(step(), adapters), provider, dtype), 3)
    setup = measure.behind_another(step, harness.device)
    least = harness.least_rounds
    seconds = {"median": measure.median_seconds(step, harness.device, setup, harness.budget, least)}
    if harness.device.type == "cuda":
        seconds["graph_median"] = measure.graph_seconds(step, harness.device, harness.budget)
    record.update({name: float(f"{value:.5g}") for name, value in seconds.items()})
    record["adapter_dtype"] = str(dtype).removeprefix("torch.")


class Ratio(NamedTuple):
    """BoRA over LoRA by hand in one case."""

    case: str
    device: float  # of the time of a CUDA graph, on a CPU of the step
    eager: float
    judged: bool
    half: bool
    rank: int
    tokens: int


def ratios(records: list[dict]) -> list[Ratio]:
    """Of each case in which frozen layer, LoRA and BoRA were all measured."""
    found = []
    for key, case in by_case(records).items():
        measured = {name: record for name, record in case.items() if record["status"] == "measured"}
        by_hand = measured.get(f"{BY_HAND}-half") or measured.get(BY_HAND)
        for name in (OURS, OURS_HALF):
            if by_hand is None or not {FROZEN, name} <= measured.keys():
                continue
            ours = measured[name]
            times = [record.get("graph_median", record["median"]) for record in (measured[FROZEN], by_hand, ours)]
            found.append(
                Ratio(
                    title(key).removeprefix("layer, step: "), times[2] / times[1], ours["median"] / by_hand["median"],
                    times[0] >= _LEAST_SECONDS, name == OURS_HALF, ours["rank"], ours["batch"] * ours["length"],
                )
            )  # fmt: skip
    return found


def table(records: list[dict]) -> str:
    """Median and worst ratio of each band, the case of the worst, and what is not judged."""
    bands: dict[str, list[Ratio]] = {band.name: [] for band in BANDS}
    for found in ratios(records):
        bands[next(band.name for band in BANDS if _holds(band, found))].append(found)
    lines = [
        "BoRA over LoRA fused by hand, device time (CUDA graph; on a CPU the step), and of the eager step",
        "| band | cases | median | worst | at most | worst case | eager: median | worst |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for band in BANDS:
        judged = [each for each in bands[band.name] if each.judged]
        if judged:
            worst = max(judged, key=lambda each: each.device)
            eager = [each.eager for each in judged]
            limit = "" if band.limit is None else f"{band.limit:.2f}" + " (missed)" * (worst.device > band.limit)
            cells: list[Any] = [band.name, len(judged), f"{statistics.median(e.device for e in judged):.2f}"]
            cells += [f"{worst.device:.2f}", limit, worst.case, f"{statistics.median(eager):.2f}", f"{max(eager):.2f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    small = [each for found in bands.values() for each in found if not each.judged]
    if small:
        worst = max(small, key=lambda each: each.device)
        lines.append(
            f"\nReported, not judged, for a frozen step of less than {1e6 * _LEAST_SECONDS:.0f} µs: "
            f"{len(small)} cases, median {statistics.median(each.device for each in small):.2f}, "
            f"worst {worst.device:.2f} ({worst.case})"
        )
    failed = [record for record in records if record["status"] == "failed"]
    lines += [f"failed: {_name(record)}: {record.get('reason')}" for record in failed]
    return "\n".join(lines)


def line(records: list[dict], case: Case) -> str:
    """A case that was just measured, in a line."""
    own = [record for record in records if _key(record) == _key(asdict(case))]
    times = ", ".join(f"{each.device:.2f}" for each in ratios(own)) or "not measured"
    return f"{title(_key(asdict(case))).removeprefix('layer, step: ')}: {times}"


def _holds(band: Band, ratio: Ratio) -> bool:
    inside = band.ranks[0] <= ratio.rank <= band.ranks[1] and band.tokens[0] <= ratio.tokens <= band.tokens[1]
    return inside and band.half == ratio.half


def _name(record: dict) -> str:
    return f"{record['provider']} {record['shape']}, {record['length']} tokens, r = {record['rank']}"


def resume(harness: Harness, result: dict) -> None:
    """Go on with the records of an earlier result.

    Raises ValueError where it is of another device, other versions or another commit.
    """
    for name in ("device", "versions", "commit"):
        expected, got = harness.environment[name], result["environment"][name]
        if expected != got:
            raise ValueError(f"a sweep that is continued must have the same {name}, got {got} and {expected} here")
    harness.records += [record for record in result["records"] if record["status"] == "measured"]
