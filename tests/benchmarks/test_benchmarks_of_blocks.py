"""Benchmarks of whole blocks: models after ``fuse`` and with Liger's kernels, and their steps as CUDA graphs."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

import bora_kernels
from benchmarks import liger, measure, readme, records, report
from benchmarks.adapting import install
from benchmarks.cases import Case, layer_cases, model_cases
from benchmarks.harness import Harness
from benchmarks.models import Workload
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.verify import References, make_step, named

CPU = torch.device("cpu")
CASE = Case("model", "step", "tiny", 1, 8, 4, "fp32")
AFTER_FUSE = [p for p in PROVIDERS if p.name.endswith("-fuse") and not p.liger]


@pytest.mark.parametrize("provider", AFTER_FUSE, ids=lambda p: p.name)
def test_models_after_fuse_are_right_and_fused(provider: Provider) -> None:
    if provider.library is not None:
        pytest.importorskip(provider.library)
    workload = Workload(CASE, CPU)
    root = workload.copy(workload.root, share=True)
    adapters = install(provider.adapt, root, workload, CASE.rank, torch.float32)
    workload.set_mode(root, training=True, checkpointing=False)
    said = str(bora_kernels.explain(root)).splitlines()
    assert sum("gated MLP" in line for line in said) >= 1, said
    step = make_step(root, workload.x.requires_grad_(), workload.dy, adapters, "step")
    assert References(workload, CASE.rank).check(named(step(), adapters), provider, torch.float32) <= 2


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, in_place):
        ctx.in_place = in_place
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return (dy.mul_(2) if ctx.in_place else 2 * dy), None


@pytest.fixture
def library(monkeypatch):
    """Stands for Liger, whose kernels need a GPU: it replaces names of transformers' file and binds a forward."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    fake = types.ModuleType("liger_kernel.transformers")
    fake.liger_rotary_pos_emb = lambda q, k, cos, sin: (q, k)

    def apply_liger_kernel_to_llama(rope, fused_linear_cross_entropy, model):
        assert not rope and not fused_linear_cross_entropy
        llama.LlamaRMSNorm = llama.LlamaMLP = type(None)
        model.norm.in_place = True
        model.norm.forward = types.MethodType(lambda self, x: _Doubled.apply(x, self.in_place), model.norm)

    fake.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    return llama


def test_liger_stays_in_its_model(library) -> None:
    own = {name: getattr(library, name) for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")}
    root = Workload(CASE, CPU).root
    assert liger.apply(root) is root and "forward" in vars(root.model.norm)
    with pytest.raises(ZeroDivisionError), liger.rotation():
        assert library.apply_rotary_pos_emb(1, 2, 3, 4) == (1, 2)
        raise ZeroDivisionError
    assert {name: getattr(library, name) for name in own} == own


def test_a_step_with_liger_leaves_the_gradient_that_all_rows_are_given(library) -> None:
    workload = Workload(CASE, CPU)
    dy = workload.dy.clone()
    step = make_step(liger.apply(workload.root), workload.x.requires_grad_(), workload.dy, [], "step")
    (_, first), (_, again) = step(), step()
    assert torch.equal(workload.dy, dy) and torch.equal(first, again)


def test_references_know_nothing_of_what_is_open_around_a_step(library, monkeypatch) -> None:
    """With Liger's rotation around the reference too, a wrong rotation would be right."""
    (provider,) = [p for p in PROVIDERS if p.name == "frozen-liger"]
    monkeypatch.setattr(Provider, "problem", lambda *_: None)
    monkeypatch.setattr(liger, "apply", lambda root: root)
    harness = Harness(CPU, budget=0.01, least_rounds=1, commit="abc")
    with pytest.raises(AssertionError, match="y is off"):
        harness.measure(CASE, provider, None)


FURTHER = [case for case in model_cases("cpu") if case.main_only]
OF_MODELS = [p for p in PROVIDERS if p.runs(FURTHER[0]) and p.by_default(FURTHER[0])]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("provider", OF_MODELS, ids=lambda p: p.name)
@pytest.mark.parametrize("case", FURTHER, ids=lambda case: case.shape)
def test_providers_are_right_in_other_families(case: Case, provider: Provider) -> None:
    """Biases, GeGLU and norms of 1 + w, none of them 0 or 1 throughout."""
    pytest.importorskip("transformers")
    if provider.library is not None:
        pytest.importorskip(provider.library)
    case = dataclasses.replace(case, batch=1, length=8, rank=4)
    workload = Workload(case, CPU)
    biases = [layer.bias for layer in workload.root.modules() if getattr(layer, "bias", None) is not None]
    assert len(biases) == (3 * 4 if case.shape == "tiny-qwen2" else 0) and all(bias.any() for bias in biases)
    assert all(p.std() > 0.03 for p in workload.root.parameters() if p.ndim == 1)
    root = workload.copy(workload.root, share=True)
    adapters = install(provider.adapt, root, workload, case.rank, torch.float32)
    workload.set_mode(root, training=True, checkpointing=False)
    if provider in AFTER_FUSE:
        assert sum("gated MLP" in line for line in str(bora_kernels.explain(root)).splitlines()) >= 1
    step = make_step(root, workload.x.requires_grad_(), workload.dy, adapters, "step")
    References(workload, case.rank).check(named(step(), adapters), provider, torch.float32)


def test_further_families_are_measured_where_their_blocks_are() -> None:
    shapes = [case.shape for case in model_cases("cuda") if case.main_only]
    assert shapes == ["qwen2.5-7b", "gemma2-9b"] and not any(case.main_only for case in model_cases("cuda", quick=True))
    case = model_cases("cuda")[-1]
    names = {p.name for p in PROVIDERS if p.runs(case)}
    assert {"frozen", "lora-by-hand-half", "fused-bora", "fused-bora-fuse"} <= names
    assert not [name for name in names if "liger" in name]


COMPILED = [p for p in PROVIDERS if p.name.endswith("-compiled") and "model" in p.levels]


def test_compiled_models_are_measured_on_request() -> None:
    lead, *_, last = model_cases("cuda")
    assert len(COMPILED) == 7 and all(p.runs(lead) and not p.by_default(lead) for p in COMPILED)
    assert not any(p.runs(last) for p in COMPILED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen-compiled", "fused-bora-fuse-compiled"])
def test_compiled_models_are_right_and_compiled(name: str) -> None:
    (provider,) = [p for p in COMPILED if p.name == name]
    if problem := provider.problem(CPU, CASE):
        pytest.skip(problem)
    workload = Workload(CASE, CPU, layers=1)
    root = workload.copy(workload.root, share=True)
    adapters = install(provider.adapt, root, workload, CASE.rank, torch.float32)
    workload.set_mode(root, training=True, checkpointing=False)
    step = make_step(root, workload.x.requires_grad_(), workload.dy, adapters, "step")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    result = named(step(), adapters)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert References(workload, CASE.rank).check(result, provider, torch.float32) <= 2


def test_liger_is_left_out_with_a_reason(monkeypatch) -> None:
    (provider,) = [p for p in PROVIDERS if p.name == "frozen-liger"]
    found = {"liger_kernel": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.get(name, True))
    assert provider.problem(torch.device("cuda"), CASE) == "liger_kernel is not installed"
    found.clear()
    assert provider.problem(CPU, CASE) == "Liger's kernels need a GPU"
    assert provider.problem(torch.device("cuda"), CASE) is None


class _Timed:
    """Stands for the benchmark fixture."""

    stats = None

    def __init__(self) -> None:
        self.extra_info: dict = {}

    def pedantic(self, step, setup, rounds) -> None:
        step()


def test_small_models_are_timed_as_graphs(monkeypatch) -> None:
    graphs = [case for case in model_cases("cuda", full=True) if case.graphed]
    assert {(case.batch, case.length, case.checkpointing) for case in graphs} == {(1, 1024, False)}
    assert all(case.graphed for case in layer_cases("cuda"))
    harness = Harness(CPU, budget=0.01, least_rounds=1, commit="abc")
    monkeypatch.setattr(harness, "device", types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(harness, "load", lambda case: loaded)
    monkeypatch.setattr(harness, "_time", lambda *_: None)
    for name in ("peak_bytes", "graph_seconds"):
        monkeypatch.setattr(measure, name, lambda *_: 3)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    workload = Workload(CASE, CPU)
    loaded = workload, References(workload, CASE.rank)
    providers = [p for p in PROVIDERS if p.name in ("frozen", "fused-bora-fuse")]
    for case in (CASE, Case("model", "step", "tiny", 4, 2048, 4, "fp32")):
        for provider in providers:
            harness.measure(case, provider, _Timed())
    assert [record.get("graph_median") for record in harness.records] == [3, 3, None, None]


def result() -> dict:
    fields = dict(zip(records.CASE_FIELDS, readme._MODEL, strict=True)) | {"status": "measured", "flop": 1e12}
    times = {"frozen": 70.0, "fused-bora": 84.0, "fused-bora-fuse": 71.0, "peft-dora-fuse": 77.0}
    made = [
        fields | {"provider": name, "title": name, "median": ms / 1e3, "peak_bytes": int(ms) << 20}
        for name, ms in times.items()
    ]
    made[0]["graph_median"], made[2]["graph_median"] = 8e-3, 12e-3
    environment = {"date": "2000-01-01", "device": "a device", "cpu": "a CPU", "system": "an OS", "clock": "a clock"}
    environment |= {"commit": "abc", "versions": {"torch": "1", "triton": "2", "peft": "3"}}
    return {"environment": environment, "gemm_tflops": {}, "records": made}


def test_tables_have_rows_after_fuse() -> None:
    rows = readme.text([result()]).splitlines()
    assert "| **BoRA, `FusedBoraLinear` after `fuse`** | – | – | 71 | 71 |" in rows
    assert "| **DoRA, PEFT after `fuse`** | – | – | 77 | 77 |" in rows
    details = report.markdown(result()).partition("## Every case")[2].splitlines()
    header = next(line for line in details if line.startswith("| provider"))
    cells = next(line for line in details if line.startswith("| fused-bora-fuse |")).split("|")
    assert cells[header.split("|").index(" graph × frozen ")].strip() == "1.50"


def test_charts_have_bars_after_fuse(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    from benchmarks import charts

    assert charts.draw(result(), tmp_path) == ["models.png"]
    assert {p.name for p in AFTER_FUSE} <= charts._NAMES.keys() and all(p.charted for p in AFTER_FUSE)
