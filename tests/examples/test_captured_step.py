"""The step that an example captures into a CUDA graph trains as the eager one does; a CPU runs the latter alone."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.accuracy import assert_accurate

PATH = Path(__file__).parents[2] / "examples" / "captured_step.py"
SMALL = {"width": 32, "blocks": 2, "tokens": 24, "rank": 4}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("captured_step", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(example, model, batches, *, captured=False, learning_rate=1e-2):
    """The losses and what was trained; the model changes."""
    losses, _ = example.train(model, batches, learning_rate, captured=captured)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.tensor(losses, dtype=batches[0][0].dtype), **parameters}


def test_the_example_trains(example, capsys):
    example.main([word for name, size in SMALL.items() for word in (f"--{name}", str(size))] + ["--steps", "60"])
    printed = capsys.readouterr().out
    backend, cuda = ("triton", True) if torch.cuda.is_available() else ("torch", False)
    assert f"adapted layers: 6 {backend}" in printed and "2× gated MLP" in printed and "2× RMSNorm" in printed, printed
    losses = [line.split()[-3::2] for line in printed.splitlines() if " ms a step, loss " in line]
    assert len(losses) == (2 if cuda else 1), printed
    assert all(float(last) < 0.8 * float(first) for first, last in losses), printed
    assert ("CUDA graphs need a CUDA device" in printed) != cuda
    assert ("largest difference of their losses" in printed) == cuda


def test_too_few_steps_are_refused(example, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main(["--steps", "5"])
    assert "--steps must be 6 or more, got 5" in capsys.readouterr().err


@pytest.mark.gpu
def test_captured_steps_train_as_eager_ones(example):
    """Ten steps, of which seven are replays: losses and parameters err from float64's no more than eager ones do."""
    model, batches = example.student_and_batches(**SMALL, steps=10, device="cuda", dtype=torch.float32)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    wide = copy.deepcopy(model).double()
    exact = trained(example, wide, [(x.double(), target.double()) for x, target in batches])
    graph = trained(example, copy.deepcopy(model), batches, captured=True)
    eager = trained(example, model, batches)
    assert_accurate(graph, eager, exact, samples=SMALL["rank"])
    assert graph["losses"].unique().numel() == 10 and graph["losses"][-1] < graph["losses"][0]
    assert not [name for name, value in start.items() if torch.equal(graph[name], value)]


@pytest.mark.gpu
def test_batches_of_another_shape_are_refused(example):
    step = example.CapturedStep(lambda x: x.sum(), torch.ones(3, 2, device="cuda"))
    with pytest.raises(ValueError, match=r"inputs must be \[3, 2\], as in the capture, got \[1, 2\]"):
        step(torch.ones(1, 2, device="cuda"))
