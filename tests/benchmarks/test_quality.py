"""The study's code: its engine against the package, its pieces end to end on made-up data."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks.quality import check, stages, synthetic, teachers
from benchmarks.quality.__main__ import main
from benchmarks.quality.encoder import Encoder
from benchmarks.quality.language import LanguageModel
from benchmarks.quality.methods import METHODS, Layers, initial_parameters
from benchmarks.quality.session import shallow
from benchmarks.quality.tasks import Sizes, make_task
from benchmarks.quality.training import Run, train
from bora_kernels.reference import bora_weight_ref

SIZES = Sizes(steps=5, batch=4, train=40, length=12, validation=30, test=31, runs_at_once=40, eval_tokens=1000)
CPU = torch.device("cpu")
adapters = pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.is_adapter])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return synthetic.arrays(examples=240)


@pytest.fixture(scope="module")
def encoder(data):
    return Encoder(data, CPU)


# ---- the engine ----


@adapters
def test_the_layer_is_the_references(method):
    """y and W' of each run are those of the dense reference, off the start, in float64."""
    N, K, seeds, spec = 11, 7, [1, 5, 9], METHODS[method]
    weight = torch.randn(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = initial_parameters(spec, {"l": weight}, seeds, 3)
    generator = torch.Generator().manual_seed(3)
    parameters = {
        n: t.double() + 0.2 * torch.randn(t.shape, generator=generator, dtype=torch.float64)
        for n, t in parameters.items()
    }
    bias = torch.arange(N).double()
    layers = Layers(spec, {"l": weight}, {"l": bias}, parameters, 1.7)
    x = torch.randn(len(seeds), 6, K, dtype=torch.float64, generator=generator)
    y, effective = layers("l", x), layers.effective_weight("l")
    for i in range(len(seeds)):
        A, B, row, col = (parameters[f"l.{p}"][i] if f"l.{p}" in parameters else None for p in ("A", "B", "row", "col"))
        if A is None:
            A, B = weight.new_zeros(1, K), weight.new_zeros(N, 1)
        expected = bora_weight_ref(weight, A, B, row, col, scaling=1.7, norm_order=spec.order)
        torch.testing.assert_close(effective[i], expected, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(y[i], x[i] @ expected.T + bias, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["movies", "bbc_lm", "addition"])
def test_the_engine_agrees_with_the_package(name, data, encoder):
    model = encoder if name == "movies" else LanguageModel(data, CPU)
    found = check.check(model, make_task(data, name, SIZES, CPU))
    assert found.keys() == METHODS.keys() - ({"head"} if name != "movies" else set())
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize("task, kind", [("movies", Encoder), ("bbc_lm", LanguageModel)])
def test_a_deep_model_is_checked_by_its_first_layers(task, kind, data):
    model = kind(data, CPU)
    found = check.check(shallow(model, 1), make_task(data, task, SIZES, CPU))
    assert "full" in found and model.layers == 2


def test_the_check_notices_another_formula(data, encoder, monkeypatch):
    monkeypatch.setattr(check.PackageLayers, "__call__", lambda self, *a: 1.01 * Layers.__call__(self, *a))
    with pytest.raises(RuntimeError, match="bora: the engine must agree with the package"):
        check.check(encoder, make_task(data, "movies", SIZES, CPU))


@pytest.mark.parametrize(
    ("task", "method"), [("movies", "bora"), ("tweets_r", "full"), ("swap", "head"), ("bbc_lm", "dora")]
)
def test_a_run_does_not_depend_on_its_batch(task, method, data, encoder):
    """Of three runs at once each is what it is alone, and equal seeds start equal."""
    model = encoder if task != "bbc_lm" else LanguageModel(data, CPU)
    task = make_task(data, task, SIZES, CPU)
    runs = [Run(1, 1e-3), Run(2, 1e-3), Run(1, 4e-3, magnitude_factor=4.0)]
    together = train(model, task, method, runs)
    for run, record in zip(runs, together, strict=True):
        (alone,) = train(model, task, method, [run])
        for key in ("validation", "test", "validation_loss", "test_loss", "train_loss"):
            assert record[key] == pytest.approx(alone[key], rel=1e-4)
    assert together[0]["test_loss"] != together[2]["test_loss"] != together[1]["test_loss"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("task", "method"), [("movies", "bora"), ("tweets_r", "full"), ("swap", "head"), ("bbc_lm", "dora")]
)
def test_a_graph_gives_what_single_launches_give(task, method, data):
    """Over whole trainings: each step's examples and parameters reach the graph."""
    cuda = torch.device("cuda")
    model = (LanguageModel if task == "bbc_lm" else Encoder)(data, cuda)
    runs, task = [Run(1, 1e-3), Run(2, 4e-3, magnitude_factor=4.0)], make_task(data, task, SIZES, cuda)
    records = [train(model, task, method, runs, graph=graph) for graph in (True, False)]
    for replayed, launched in zip(*records, strict=True):
        for key in ("validation_loss", "test_loss", "train_loss"):
            assert replayed[key] == pytest.approx(launched[key], rel=1e-4)


def test_methods_share_subsets_heads_and_factors(data, encoder):
    task = make_task(data, "movies", SIZES, CPU)
    few, more = (initial_parameters(METHODS[m], encoder.weights, [4, 7], 3) for m in ("lora", "lora_r1"))
    name = encoder.queries[0]
    assert torch.equal(few[f"{name}.A"], more[f"{name}.A"][:, :3])
    assert not torch.equal(few[f"{name}.A"][0], few[f"{name}.A"][1])
    assert torch.equal(task.batch_order(4), task.batch_order(4)) and not torch.equal(
        task.batch_order(4), task.batch_order(7)
    )
    assert set(task.batch_order(4)[:, 0].tolist()) <= set(range(task.pool))


def test_parameter_counts(data, encoder):
    task = make_task(data, "movies", SIZES, CPU)
    counts = {m: train(encoder, task, m, [Run(1, 1e-3)])[0]["parameters"] for m in ("bora", "lora_r1", "lora", "dora")}
    assert counts["bora"] == counts["lora_r1"] > counts["dora"] > counts["lora"]


def test_a_diverged_run_is_recorded_at_the_floor(data, encoder):
    for name, model in (("movies", encoder), ("tweets_r", encoder), ("bbc_lm", LanguageModel(data, CPU))):
        task = make_task(data, name, SIZES, CPU)
        bad, good = train(model, task, "full", [Run(1, 1e30), Run(2, 1e-4)])
        assert bad["diverged"] and not good["diverged"]
        assert np.isfinite([bad["validation"], bad["test"], bad["test_loss"]]).all()
        json.dumps(bad, allow_nan=False)
    assert bad["test"] == pytest.approx(-100 * bad["test_loss"])


def test_teachers_are_learned_by_the_methods_that_hold_them():
    for teacher, good, bad in (
        ("low rank", "lora", "scales"),
        ("rows", "dora", "lora"),
        ("rows and columns", "bora", "dora"),
    ):
        runs = [Run(seed, 1.6e-2) for seed in (1, 2)]
        (a, b), (c, d) = (teachers.train(teacher, m, runs, CPU, steps=150) for m in (good, bad))
        assert min(a["test"], b["test"]) > 90 > 85 > max(c["test"], d["test"])


# ---- stages ----


def test_the_grid_is_widened_until_the_best_lies_inside():
    grid = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert stages.widened(grid, 2) is None
    assert stages.widened(grid, 4) == [*grid, 32.0]
    assert stages.widened(grid, 0) == [0.5, *grid]
    assert stages.widened([2.0**i for i in range(9)], 8) is None  # four were added


def record(lr, validation, seed=1, **other):
    return {"stage": "stage1", "task": "t", "method": "m", "lr": lr, "seed": seed, "validation": validation, **other}


def test_the_rate_is_chosen_by_the_mean_over_seeds_of_a_complete_stage():
    scores = {0.5: (1, 1), 1.0: (9, 0), 2.0: (5, 5), 4.0: (0, 0), 8.0: (0, 9.5)}
    records = [record(lr, v, seed) for lr, values in scores.items() for seed, v in enumerate(values)]
    assert stages.chosen_rate(records, "t", "m", (0, 1)) == 2.0
    assert stages.chosen_rate(records[:-1], "t", "m", (0, 1)) is None
    rising = [record(lr, lr, seed) for lr in (1.0, 2.0, 4.0, 8.0, 16.0) for seed in (0, 1)]
    assert stages.chosen_rate(rising, "t", "m", (0, 1)) is None  # its grid is yet to be widened


@pytest.fixture
def fewer(monkeypatch):
    """An even smaller ``--small``."""
    few = synthetic.arrays(examples=150)
    monkeypatch.setattr(synthetic, "arrays", lambda: few)
    small = dataclasses.replace(SIZES, steps=4, validation=20, test=20)
    monkeypatch.setattr("benchmarks.quality.__main__._small", lambda task: small)


def run(tmp_path, command, *options):
    return main([command, "--small", "--out", str(tmp_path / "runs.json"), "--device", "cpu", *options])


def read(tmp_path):
    return json.loads((tmp_path / "runs.json").read_text())


@pytest.mark.slow
def test_the_study_from_start_to_end(tmp_path, fewer, capsys):
    """Stages 1 and 2 over all primary tasks, everything else once; what is done is not done again."""
    primary = ("--methods", "bora", "lora_r1", "dora", "lora")
    assert run(tmp_path, "stage1", *primary) == 0
    first = read(tmp_path)["records"]
    assert {r["stage"] for r in first} == {"stage1"} and {r["seed"] for r in first} == {1001, 1002}
    for command in ("stage2", "bbc_lm"):
        assert run(tmp_path, command, *primary) == 0
    assert run(tmp_path, "sensitivity", "--tasks", "movies", *primary) == 0
    assert run(tmp_path, "mechanism", "--tasks", "movies", *primary) == 0
    done = read(tmp_path)["records"]
    assert done[: len(first)] == first
    for command in ("stage1", "stage2", "bbc_lm"):
        assert run(tmp_path, command, *primary) == 0
    assert read(tmp_path)["records"] == done
    session = read(tmp_path)["sessions"][0]
    assert session["commit"] and session["device"] and session["versions"]["torch"] == torch.__version__
    assert session["checks"]["encoder"].keys() >= {"bora", "columns"}

    main(["report", "--out", str(tmp_path / "runs.json"), "--folder", str(tmp_path / "report")])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Finding: incomplete" in text and "made-up data" in text
    for title in (
        "## Scores of the primary",
        "## Sensitivity",
        "rank 16",
        "own rate of magnitudes, × 16",
        "## Mechanism",
    ):
        assert title in text
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    names = "contrasts learning_rates others magnitudes ranks figure2 figure3".split()
    assert pictures in ({f"{name}.png" for name in names}, set())  # none without matplotlib
    assert all(f"({name})" in text for name in pictures)


def test_a_session_without_time_keeps_what_is_done(tmp_path, fewer, capsys):
    options = ("--methods", "lora", "--tasks", "movies", "nyt")
    assert run(tmp_path, "stage1", *options, "--minutes", "0") == 3
    assert "out of time, 2 of 2 left" in capsys.readouterr().out
    assert read(tmp_path)["records"] == []
    assert run(tmp_path, "stage1", *options) == 0 and read(tmp_path)["records"]


def test_stage_2_waits_for_stage_1(tmp_path, fewer, capsys):
    assert run(tmp_path, "stage2", "--methods", "lora", "--tasks", "movies") == 0
    assert "stage 1 of lora on movies is not complete" in capsys.readouterr().out
    assert read(tmp_path)["records"] == []


def test_all_runs_the_stages_that_are_named(tmp_path, fewer, capsys):
    options = ("--stages", "stage1", "teachers", "--methods", "lora", "columns")
    assert run(tmp_path, "all", *options) == 0
    assert {(r["stage"], r["method"]) for r in read(tmp_path)["records"]} == {
        (stage, method) for stage in ("stage1", "teachers") for method in ("lora", "columns")
    }


def test_loras_rate_is_run_where_it_is_another(tmp_path, fewer, capsys):
    """Columns get LoRA's learning rate where theirs is another; else stage 2 has these runs."""
    methods = ("--tasks", "movies", "--methods", "lora", "columns")
    assert run(tmp_path, "stage1", *methods) == 0
    path, variant = tmp_path / "runs.json", "LoRA's learning rate"
    for same in (True, False):
        content = read(tmp_path)
        for r in content["records"]:
            best = 0.0024 if same or r["method"] == "lora" else 0.0012
            r["validation"] = 1.0 if r["lr"] == best else 0.0
        path.write_text(json.dumps(content))
        assert run(tmp_path, "sensitivity", *methods) == 0
        found = [r for r in read(tmp_path)["records"] if r["stage"] == "sensitivity" and r["variant"] == variant]
        assert {(r["method"], r["lr"]) for r in found} == (set() if same else {("columns", 0.0024)})


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["stage1", "--help"], ["report", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert "usage: python -m benchmarks.quality" in capsys.readouterr().out
