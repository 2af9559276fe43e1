"""The sweep: what it measures, how it judges, and that it goes on where its time was over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sweep
from benchmarks.cases import Case
from benchmarks.harness import Harness
from benchmarks.providers import PROVIDERS

ROOT = Path(__file__).parents[2]


def records(
    tokens: int, rank: int, frozen: float, by_hand: float, ours: float, half: float | None = None
) -> list[dict]:
    """Of one case, in µs of a CUDA graph; eager steps take 100 µs more."""
    times = {"frozen": frozen, "lora-by-hand-half": by_hand, "fused-bora": ours}
    times |= {} if half is None else {"fused-bora-half": half}
    case = {"level": "layer", "mode": "step", "shape": "96x48", "batch": 1, "length": tokens, "rank": rank}
    case |= {"dtype": "bf16", "checkpointing": False, "base": "dense", "status": "measured"}
    return [
        case | {"provider": name, "median": (t + 100) * 1e-6, "graph_median": t * 1e-6} for name, t in times.items()
    ]


def cells(text: str, band: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {band} |")]
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_worst_and_median_of_a_band():
    found = []
    for tokens, ours in ((6144, 1.1), (7001, 1.3), (8192, 1.2), (5999, 1.15), (512, 3.0)):
        found += records(tokens, 16, 80, 100, 100 * ours)
    text = sweep.table(found)
    worst = "96×48, 7001 tokens, r = 16, bf16"
    assert cells(text, "r = 16, 6,000 tokens and more") == ["3", "1.20", "1.30", "1.12 (missed)", worst, "1.10", "1.15"]
    assert cells(text, "r = 16, 3,000 to 5,999 tokens")[:4] == ["1", "1.15", "1.15", "1.20"]
    assert cells(text, "r = 16, up to 999 tokens")[2:4] == ["3.00", "1.90 (missed)"]
    assert "not judged" not in text and "failed" not in text


def test_short_steps_are_reported_and_not_judged():
    text = sweep.table(records(8192, 16, 39, 50, 100) + records(7001, 16, 41, 50, 60))
    assert cells(text, "r = 16, 6,000 tokens and more")[:3] == ["1", "1.20", "1.20"]
    assert "of less than 40 µs: 1 cases, median 2.00, worst 2.00 (96×48, 8192 tokens, r = 16, bf16)" in text


def test_ranks_and_half_precision_adapters_have_bands_of_their_own():
    text = sweep.table(
        records(8192, 4, 80, 100, 105) + records(8192, 64, 80, 100, 120, half=110) + records(512, 64, 80, 100, 210)
    )
    assert cells(text, "r up to 32, 6,000 tokens and more")[:4] == ["1", "1.05", "1.05", "1.12"]
    assert cells(text, "r = 33 to 64, 6,000 tokens and more")[:4] == ["1", "1.20", "1.20", "1.18 (missed)"]
    assert cells(text, "half-precision adapter, r up to 64, 6,000 tokens and more")[1:4] == ["1.10", "1.10", "1.12"]
    assert cells(text, "all others")[:4] == ["1", "2.10", "2.10", ""]


def test_what_failed_has_no_ratio():
    found = records(8192, 16, 80, 100, 105)
    found[2] |= {"status": "failed", "reason": "y is off"}
    text = sweep.table(found)
    assert "failed: fused-bora 96x48, 8192 tokens, r = 16: y is off" in text and "1.05" not in text


def test_cases_are_the_goals_and_mixed():
    """All tokens at rank 16, all ranks at 8192 tokens, odd numbers among them; the first few are of many kinds."""
    cases = sweep.cases("cuda")
    assert len(cases) == len(set(cases)) and cases == sweep.cases("cuda")
    assert {case.shape for case in cases} == {shape for shapes in sweep.WIDTHS.values() for shape in shapes}
    at_16 = {case.length for case in cases if case.rank == 16}
    assert {512, 1000, 1500, 2048, 3000, 5000, 6144, 7001, 8192, 12288, 16384} <= at_16
    assert {case.rank for case in cases if case.length == 8192} == {4, 8, 16, 32, 64, 128, 256}
    assert {case.length for case in cases if case.rank != 16} == {8192}
    assert len({case.shape for case in cases[:40]}) > 8 and len({case.length for case in cases[:40]}) > 6
    chosen = sweep.cases("cuda", shapes=["8x8"], tokens=[1, 2], ranks=[3, 64], dtypes=["fp16"])
    assert {(case.length, case.rank) for case in chosen} == {(1, 3), (1, 64), (2, 3), (2, 64)}
    assert [len(sweep.providers(case)) for case in sorted(chosen, key=lambda case: case.rank)] == [3, 3, 4, 4]


@pytest.mark.parametrize("dtype, rank", [("fp32", 4), pytest.param("bf16", 64, marks=pytest.mark.slow)])
def test_a_case_is_checked_and_timed(dtype, rank):
    """Adapters in half precision, too; and a provider that is wrong has no time."""
    harness = Harness(torch.device("cpu"), budget=0.005, least_rounds=1, commit="abc")
    case = Case("layer", "step", "96x80", 1, 19, rank, dtype)
    assert list(sweep.run(harness, [case], None)) == [case]
    assert [record["status"] for record in harness.records] == ["measured"] * (3 if dtype == "fp32" else 4)
    assert all(record["median"] > 0 and record["error_ratio"] <= 8 for record in harness.records)
    assert not sweep.left(harness, [case])
    assert len(sweep.ratios(harness.records)) == len(harness.records) - 2
    assert sweep.line(harness.records, case).startswith(f"96×80, 19 tokens, r = {rank}, {dtype}: ")


def test_a_wrong_result_fails_and_the_rest_goes_on(monkeypatch):
    harness = Harness(torch.device("cpu"), budget=0.005, least_rounds=1, commit="abc")
    (ours,) = [provider for provider in PROVIDERS if provider.name == "fused-bora"]
    (other,) = [provider for provider in PROVIDERS if provider.name == "fused-dora"]

    def providers(case):
        return [*known(case)[:2], type(ours)(**{**vars(ours), "adapt": other.adapt})]

    known = sweep.providers
    monkeypatch.setattr(sweep, "providers", providers)
    cases = [Case("layer", "step", shape, 1, 19, 4, "fp32") for shape in ("48x32", "32x48")]
    assert list(sweep.run(harness, cases, None)) == cases
    assert [record["status"] for record in harness.records] == ["measured", "measured", "failed"] * 2
    assert sweep.table(harness.records).count("failed: fused-bora") == 2


def test_time_that_is_over():
    harness = Harness(torch.device("cpu"), budget=0.005, least_rounds=1, commit="abc")
    cases = [Case("layer", "step", shape, 1, 19, 4, "fp32") for shape in ("48x32", "32x48")]
    assert list(sweep.run(harness, cases, 0.0)) == [] and sweep.left(harness, cases) == cases


def test_another_machine_does_not_go_on():
    harness = Harness(torch.device("cpu"), budget=0.005, least_rounds=1, commit="abc")
    done, failed = records(8192, 16, 80, 100, 105)[:2]
    failed |= {"status": "failed"}
    result = {"environment": dict(harness.environment), "records": [done, failed]}
    sweep.resume(harness, result)
    assert harness.records == [done]  # what failed is tried again
    for name, other in (("device", "another"), ("commit", "def"), ("versions", {})):
        with pytest.raises(ValueError, match=f"same {name}"):
            sweep.resume(harness, result | {"environment": result["environment"] | {name: other}})


def test_run_and_resume(tmp_path):
    """From the command line: nothing in no time, then the rest into the same file, then nothing is left."""
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--sweep", "--device", "cpu", "-p", "no:cacheprovider"]
    command += ["--shapes", "48x64", "--tokens", "16,33", "--ranks", "4", "--budget", "0.005", "--commit", "abc"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "PYTEST"))}
    environment["OMP_NUM_THREADS"] = "1"

    def run(*more: str) -> str:
        done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert "1 passed" in done.stdout
        return done.stdout

    first = run("--results", str(tmp_path), "--tokens", "16")
    (path,) = tmp_path.glob("*.json")
    assert "[####################] 1/1" in first and "BoRA over LoRA fused by hand" in first and str(path) in first
    assert "1 measured before" in run("--resume", str(path), "--minutes", "0")
    assert "[####################] 2/2" in run("--resume", str(path))
    assert len(json.loads(path.read_text())["records"]) == 6
    assert "2 cases, 2 measured before" in run("--resume", str(path))
