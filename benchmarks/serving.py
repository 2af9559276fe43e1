"""Mixed batches: device time of a layer with an adapter for each entry over that of its base product alone.

    python -m benchmarks.serving                                       # a CUDA machine, about a minute
    python -m benchmarks.serving --device cpu --shapes 64x48 --layers 2
    python -m benchmarks.serving --table benchmarks/results/FILE.json  # of an earlier run

A step is one CUDA graph (on the CPU, one pass) over so many layers, each with a weight and a bank of its own, that no
weight is in the L2 cache when it is read, as in a model that decodes; the figures are those of one layer. The base
product is ``torch.nn.functional.linear``. Adapters are BoRA, DoRA, columns and LoRA in turn. A case is timed only after
its output was checked: an error to the reference in float64 of at most twice that of the dense reference in the same
dtypes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bora_kernels import AdapterBank, bora_linear_mixed
from bora_kernels.reference import bora_linear_mixed_ref
from bora_kernels.serving import BatchIndex

from . import measure
from .cases import DTYPES, Case
from .harness import Harness
from .records import by_case, load, ratio
from .report import number, table

BATCHES = ((1, 1), (8, 1), (16, 1), (32, 1), (64, 1), (256, 1), (8, 256))  # entries, tokens of each
RANK, TOLERATED = 16, 2.2
ABSENT = ((), ("magnitude_col",), ("magnitude_row",), ("magnitude_row", "magnitude_col"))


class WrongResult(Exception):
    """An output whose error is larger than it may be."""


class Layers(NamedTuple):
    """Weights [N, K], their banks, and the adapters of the first of them as the reference takes them."""

    weights: list[Tensor]
    banks: list[AdapterBank]
    adapters: list[dict | None]


def make_layers(N: int, K: int, count: int, adapters: int, dtype: torch.dtype, device: torch.device) -> Layers:
    """Layers with trained adapters, which are random."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weights, banks, first = [], [], []
    for layer in range(count):
        weight = (randn(N, K) / K**0.5).to(dtype)
        bank = AdapterBank(weight, adapters, max_rank=RANK)
        norms = {"magnitude_row": weight.float().norm(dim=1), "magnitude_col": weight.float().norm(dim=0)}
        for adapter in range(adapters):
            tensors: dict[str, Any] = {"lora_A": randn(RANK, K) / K**0.5, "lora_B": randn(N, RANK) / RANK**0.5}
            tensors |= {name: norm * (1 + 0.1 * randn(*norm.shape)) for name, norm in norms.items()}
            tensors |= dict.fromkeys(ABSENT[adapter % len(ABSENT)])
            bank.add(str(adapter), tuple(tensors.values()), scaling=0.5)
            first += [{**tensors, "scaling": 0.5}] if layer == 0 else []
        weights.append(weight)
        banks.append(bank)
    return Layers(weights, banks, [None, *first])


def check(x: Tensor, y: Tensor, layers: Layers, slots: Tensor) -> float:
    """The error of y over that of the dense reference in the same dtypes."""

    def reference(dtype: torch.dtype, wide: torch.dtype) -> Tensor:
        adapters = [
            a and {name: v.to(wide) if isinstance(v, Tensor) else v for name, v in a.items()} for a in layers.adapters
        ]
        return bora_linear_mixed_ref(x.to(dtype), layers.weights[0].to(dtype), adapters, slots)

    exact = reference(torch.float64, torch.float64)
    error, plain = ((t.double() - exact).norm().item() for t in (y, reference(x.dtype, torch.float32)))
    floor = 5e-7 * exact.norm().item()
    if not error <= TOLERATED * plain + floor:
        raise WrongResult(f"error {error:.2e}, that of the dense reference {plain:.2e}")
    return error / (plain + floor)


class Session:
    """One run: the layers of a shape, and a record for each batch and number of adapters."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.harness = Harness(self.device, 0.2, 3, options.commit, options.results)

    def run(self) -> list[dict]:
        for shape in self.options.shapes:
            N, K = map(int, shape.split("x"))
            count = self.options.layers or max(2, -(-(1 << 28) // (N * K * DTYPES[self.options.dtype].itemsize)))
            layers = make_layers(N, K, count, max(self.options.adapters), DTYPES[self.options.dtype], self.device)
            for entries, tokens in self.options.batches:
                self._measure(Case("layer", "mixed", shape, entries, tokens, RANK, self.options.dtype), layers)
        return self.harness.records

    def _measure(self, case: Case, layers: Layers) -> None:
        dtype = DTYPES[case.dtype]
        x = torch.randn(case.batch, case.length, layers.weights[0].shape[1], device=self.device).to(dtype)
        with torch.no_grad():
            with self.harness.recording(case, "frozen", "base product alone") as record:
                record["median"] = self._seconds(lambda: [F.linear(x, weight) for weight in layers.weights], layers)
            for adapters in self.options.adapters:
                title = f"{adapters} adapters" if adapters > 1 else "one adapter"
                try:
                    with self.harness.recording(case, f"mixed-{adapters}", title) as record:
                        self._mixed(record, x, layers, adapters)
                except WrongResult as problem:
                    print(f"{case}, {title}: {problem}", file=sys.stderr)

    def _mixed(self, record: dict, x: Tensor, layers: Layers, adapters: int) -> None:
        used = list(itertools.islice(itertools.cycle(range(adapters)), len(x)))
        index = layers.banks[0].index([str(number) for number in used])
        slots = torch.tensor(used, device=self.device)[:, None].expand(x.shape[:-1]) + 1
        record["error_ratio"] = round(check(x, self._call(x, layers, index)[0], layers, slots), 3)
        record["median"] = self._seconds(lambda: self._call(x, layers, index), layers)

    @staticmethod
    def _call(x: Tensor, layers: Layers, index: BatchIndex) -> list[Tensor]:
        return [bora_linear_mixed(x, w, bank, index) for w, bank in zip(layers.weights, layers.banks, strict=True)]

    def _seconds(self, step, layers: Layers) -> float:
        if self.device.type == "cuda":
            seconds = measure.graph_seconds(step, self.device, self.harness.budget)
        else:
            seconds = measure.median_seconds(step, self.device, lambda: None, self.harness.budget, least=3)
        return float(f"{seconds / len(layers.weights):.5g}")


def markdown(result: dict) -> str:
    """The table of a result."""
    environment, rows = result["environment"], []
    for (_, _, shape, entries, tokens, *_), case in by_case(result["records"]).items():
        for record in case.values():
            row = [shape.replace("x", "×"), f"{entries}×{tokens}", record["title"]]
            if not record.get("median"):
                rows.append([*row, f"{record['status']}: {record.get('reason', 'not timed')}"])
                continue
            error = number(record.get("error_ratio"), 2)
            rows.append([*row, number(1e6 * record["median"], 1), number(ratio(record, case, "frozen"), 2), error])
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    head = f"{environment['device']}; {versions}; commit {environment['commit']}; r = {RANK}."
    return head + "\n\n" + table(["weight", "entries×tokens", "", "µs", "× base product", "error"], rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu", help="(default: %(default)s)")
    add(
        "--shapes", type=lambda t: t.split(","), default=["4096x4096", "14336x4096", "4096x14336"], help="N×K, as 8x4,…"
    )
    add("--adapters", type=lambda t: [int(n) for n in t.split(",")], default=[8, 1], help="in a batch (default: 8,1)")
    add("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32", help="(default: %(default)s)")
    add("--layers", type=int, help="of each shape (default: as many as the L2 cache cannot hold)")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    add("--commit", help="the commit that is measured (default: what git says)")
    add("--table", type=Path, metavar="FILE", help="print the table of this result and measure nothing")
    options = parser.parse_args(arguments)
    options.batches = BATCHES
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if a result was wrong."""
    options = parse(arguments)
    if options.table is not None:
        print(markdown(load(options.table)))
        return 0
    session = Session(options)
    records = session.run()
    if session.harness.path is not None:
        print(markdown(load(session.harness.path)), f"written to {session.harness.path}", sep="\n\n")
    return int(any(record["status"] != "measured" for record in records))


if __name__ == "__main__":
    sys.exit(main())
