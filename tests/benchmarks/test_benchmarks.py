"""The benchmark suite: a whole quick run, right providers and cases, and no time for a wrong result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, records, report
from benchmarks.adapting import DenseLinear, Formula, dense, install
from benchmarks.cases import MODES, Case, layer_cases, model_cases
from benchmarks.harness import Harness
from benchmarks.models import Workload
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.verify import References, WrongResult, make_step, named

ROOT = Path(__file__).parents[2]
BORA = Formula("bora")


def test_setups_queue_or_wait(monkeypatch) -> None:
    """A step is launched behind itself, or on a device that has been waited for; the L2 cache is emptied in between."""
    calls, device = [], torch.device("cuda")
    monkeypatch.setattr(measure, "_flush", lambda device: calls.append("flush"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    measure.behind_another(lambda: calls.append("step"), device)()
    measure.on_idle_device(device)()
    assert calls == ["step", "flush", "flush", "wait"]
    assert measure.behind_another(lambda: calls.append("step"), torch.device("cpu"))() is None and len(calls) == 4


def test_quick_run(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    providers = ["frozen", "fused-bora", "fused-bora-reused"]
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "--device", "cpu", "-p", "no:cacheprovider"]
    command += ["--shapes", "48x64", "--tokens", "16", "--providers", ",".join(providers), "--results", str(tmp_path)]
    command += ["--full", "--cases", "*-fp32"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "PYTEST"))}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    (path,) = tmp_path.glob("*.json")
    result = records.load(path)
    assert {record["status"] for record in result["records"]} == {"measured"}
    cases = records.by_case(result["records"])
    assert {key[:2] for key in cases} == {
        ("layer", "step"),
        ("layer", "forward"),
        ("layer", "inference"),
        ("model", "step"),
        ("model", "inference"),
    }
    for (_, mode, *_), case in cases.items():
        assert list(case) == [name for name in providers if mode != "forward" or name != "fused-bora-reused"]
        assert all(record["median"] > 0 and record["error_ratio"] <= 3 for record in case.values())
        assert records.ratio(case["fused-bora"], case, "frozen") == pytest.approx(
            case["fused-bora"]["median"] / case["frozen"]["median"]
        )
    assert "FusedBoraLinear" in report.markdown(result)


NF4 = Case("model", "step", "tiny", 1, 8, 4, "fp32", base="nf4")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p.runs(NF4)], ids=lambda p: p.name)
def test_providers_over_4_bits(provider: Provider) -> None:
    """Each adapts the 4-bit layers themselves, shares their memory, and is right about the weights they stand for."""
    pytest.importorskip("bitsandbytes")
    if provider.library is not None:
        pytest.importorskip(provider.library)
    workload = Workload(NF4, torch.device("cpu"))
    memory = {workload.root.get_submodule(name).weight.data_ptr() for name in workload.targets}
    root = workload.copy(workload.root, share=True)
    adapters = install(provider.adapt, root, workload, NF4.rank, torch.float32)
    assert memory <= {tensor.data_ptr() for tensor in (*root.parameters(), *root.buffers())}
    assert not any(tensor.shape == workload.weights[0].shape for tensor in (*root.parameters(), *root.buffers()))
    workload.set_mode(root, training=True, checkpointing=False)
    step = make_step(root, workload.x.requires_grad_(), workload.dy, adapters, "step")
    assert References(workload, NF4.rank).check(named(step(), adapters), provider, torch.float32) <= 8


def test_bora_of_peft_has_its_own_layers() -> None:
    pytest.importorskip("peft")
    case = Case("model", "step", "tiny", 1, 8, 4, "fp32")
    workload = Workload(case, torch.device("cpu"))
    (provider,) = [p for p in PROVIDERS if p.name == "peft-bora"]
    root = workload.copy(workload.root, share=True)
    adapters = install(provider.adapt, root, workload, case.rank, torch.float32)
    assert {type(root.get_submodule(name)).__name__ for name in workload.targets} == {"BoraLinear"}
    assert all(list(adapter) == ["lora_A", "lora_B", "magnitude_row", "magnitude_col"] for adapter in adapters)


class _NoBenchmark:
    """Stands for the fixture where nothing may be timed."""

    def pedantic(self, *args, **kwargs) -> None:
        raise AssertionError("a wrong result was timed")


def _off_by(factor: float):
    class Off(DenseLinear):
        def forward(self, x):
            return super().forward(x) * factor

    def adapt(root, targets, rank, adapter_dtype):
        adapters = dense(BORA)(root, targets, rank, adapter_dtype)
        for name in targets:
            root.get_submodule(name).__class__ = Off
        return adapters

    return adapt


@pytest.mark.parametrize(
    "adapt, ours, wrong",
    [
        (_off_by(1.0001), True, "y is off"),
        (_off_by(1.0001), False, "y is off"),
        (_off_by(float("nan")), False, "y is off by nan"),
        (dense(Formula("bora", detach_norm=True)), False, "d_lora_A is off"),
    ],
    ids=["output", "output-of-a-peer", "nan", "gradient"],
)
def test_wrong_result_is_refused(adapt, ours: bool, wrong: str) -> None:
    harness = Harness(torch.device("cpu"), budget=0.01, least_rounds=1, commit="abc")
    case = Case("layer", "step", "48x64", 1, 16, 8, "fp32")
    with pytest.raises(WrongResult, match=wrong):
        harness.measure(case, Provider("wrong", "wrong", BORA, adapt, ours=ours), _NoBenchmark())
    (record,) = harness.records
    assert record["status"] == "failed" and wrong in record["reason"] and "median" not in record


def test_missing_library_is_skipped() -> None:
    harness = Harness(torch.device("cpu"), budget=0.01, least_rounds=1, commit="abc")
    case = Case("layer", "step", "48x64", 1, 16, 8, "fp32")
    provider = Provider("absent", "absent", BORA, dense(BORA), library="no_such_library")
    with pytest.raises(pytest.skip.Exception):
        harness.measure(case, provider, _NoBenchmark())
    assert [(r["status"], r["reason"]) for r in harness.records] == [("skipped", "no_such_library is not installed")]


def test_what_is_measured_unless_asked_for_more() -> None:
    """Without --full the cases of the goals; modes that are asked for are had at every layer and batch."""
    layers = {(case.shape, case.length, case.rank, case.mode) for case in layer_cases("cuda") if not case.main_only}
    assert {row[:3] for row in layers if row[3] == "step"} == {row[:3] for row in layers} and len(layers) == 7
    points = [case for case in layer_cases("cuda") if case.main_only]
    assert [case.rank for case in points if case.shape == "4096x4096" and case.length == 8192] == [8, 64, 256]
    models = [str(case).removeprefix("step-") for case in model_cases("cuda")]
    llamas = ["4x2048-r16-bf16", "4x2048-r16-bf16-checkpointed", "1x1024-r16-bf16", "1x1024-r16-bf16-nf4"]
    others = [f"{name}-4x2048-r16-bf16" for name in ("qwen2.5-7b", "gemma2-9b")]
    assert models == [f"llama3-8b-{case}" for case in llamas] + others
    for cases in (layer_cases, model_cases):
        by_mode = [case for mode in MODES for case in cases("cuda", modes=[mode])]
        assert set(cases("cuda")) < set(cases("cuda", full=True)) == set(by_mode)


def test_providers_that_take_long_are_measured_once_unless_asked_for_more() -> None:
    lead, *others = layer_cases("cuda")
    places = {
        p.name: [p.runs(case) and p.by_default(case) for case in (lead, *others, *model_cases("cuda"))]
        for p in PROVIDERS
    }
    assert sum(places["dense-bora-compiled"]) == 2 and places["dense-bora-compiled"][0]  # step and inference
    for name in ("dense-bora", "fused-bora-reused"):
        assert places[name][:7] == 7 * [True] and not any(places[name][7:])
    layers = len(layer_cases("cuda"))
    models = len(model_cases("cuda"))
    first_model = [number == layers for number in range(layers + models)]
    assert places["peft-dora"] == [number < 7 or first for number, first in enumerate(first_model)]
    for name in ("frozen-liger", "peft-dora-liger", "fused-bora-liger-fuse"):
        assert places[name] == first_model
    for name in ("peft-lora-fuse", "peft-dora-fuse", "fused-bora-fuse"):
        assert places[name] == [number >= layers for number in range(layers + models)]
    for name in ("frozen", "peft-lora", "peft-lora-half", "peft-dora-half", "fused-bora"):
        assert all(places[name])
    dense = [case.base == "dense" for case in (lead, *others, *model_cases("cuda"))]
    assert places["lora-by-hand"] == places["lora-by-hand-half"] == dense


def test_patterns_of_cases() -> None:
    names = "step-llama3-8b-4x2048-r16-bf16-nf4-checkpointed", "inference-llama3-8b-1x1024-r16-bf16"
    case = {str(case): case for case in model_cases("cuda", full=True)}
    for patterns, expected in ((None, (True, True)), ("*-nf4*,x", (True, False)), ("*-bf16", (False, True))):
        assert tuple(case[name].matches(patterns) for name in names) == expected
