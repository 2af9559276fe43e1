"""Which backend runs where, what is said where Triton cannot, and that nothing imports it that does not use it."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.cases import Case

from bora_kernels import bora_linear
from bora_kernels.ops import calls, validation

M, N, K, R = 3, 6, 5, 2


def arguments(**changed):
    return {**Case(M, N, K, R).inputs("cpu"), "scaling": 0.5, "backend": "torch", **changed}


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(calls, "_prepared", {})


def test_triton_without_triton(monkeypatch):
    monkeypatch.setattr(validation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match='backend="triton" cannot run here: triton is not installed'):
        bora_linear(**arguments(backend="triton"))


def test_triton_without_a_device(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='backend="triton" cannot run here: it needs a CUDA device .* got cpu'):
        bora_linear(**arguments(backend="triton"))


def test_triton_with_float64():
    pytest.importorskip("triton")
    wide = {name: None if t is None else t.double() for name, t in Case(M, N, K, R).inputs("cpu").items()}
    with pytest.raises(ValueError, match="it computes in float32, bfloat16 and float16, got torch.float64"):
        bora_linear(**arguments(**wide, backend="triton"))


def test_triton_with_a_large_rank(monkeypatch):
    monkeypatch.setattr(validation, "triton_problem", lambda device, dtype: None)
    large = {"lora_A": torch.zeros(513, K), "lora_B": torch.zeros(N, 513)}
    with pytest.raises(ValueError, match="supports lora_A of rank up to 512, got rank 513"):
        bora_linear(**arguments(**large, backend="triton"))
    assert bora_linear(**arguments(**large, backend=None)).shape == (M, N)


@pytest.mark.filterwarnings("ignore:A layer on a CUDA device")
def test_default_backend(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    problems = {torch.float32: None, torch.float64: "no"}
    monkeypatch.setattr(validation, "triton_problem", lambda device, dtype: problems[dtype])
    chosen = [
        validation.choose_backend(None, device, dtype, rank)
        for device, dtype, rank in (
            (cuda, torch.float32, 16),
            (cuda, torch.float32, 513),
            (cuda, torch.float64, 16),
            (cpu, torch.float32, 16),
        )
    ]
    assert chosen == ["triton", "torch", "torch", "torch"]


@pytest.mark.parametrize("installed", [True, False], ids=["with-triton", "without-triton"])
def test_import_needs_no_triton(installed):
    """A plain import and the torch backend never import Triton, so they work where it is missing."""
    script = f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    imported.append(name)
                    if not {installed}:
                        raise ModuleNotFoundError(name)

        imported = []
        import torch  # which may look for Triton itself
        present = set(sys.modules)
        sys.meta_path.insert(0, Blocker())
        import bora_kernels
        module = bora_kernels.FusedBoraLinear(4, 3, r=2)
        module(torch.ones(2, 4)).sum().backward()
        module.merge()
        new = {{name for name in set(sys.modules) - present if name.split(".")[0] == "triton"}}
        assert not new and not imported, (new, imported)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
