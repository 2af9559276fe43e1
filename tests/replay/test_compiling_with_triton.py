"""Kernels compiled side by side by Triton itself, for a device that this machine need not have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

ROOT = Path(__file__).parents[2]

_WITH_TRITON = """
import contextlib, sys
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

loaded = []


class Launcher:
    def __init__(self, source, metadata):
        loaded.append(source.name)

    def __call__(self, *arguments):
        pass


class Device:
    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 3, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 1 << 18}
    )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Device())
torch.cuda.current_device, torch.cuda.device = (lambda: 0), (lambda index: contextlib.nullcontext())
from bora_kernels.kernels.combine import combine
from bora_kernels.replay import compiling
from bora_kernels.replay.recording import planning

compilations = []
triton.knobs.compilation.listener = lambda **what: compilations.append(what["cache_hit"])
parts, total = torch.zeros(2, 64, 16), torch.zeros(2, 64)


def run():
    vectors = [torch.ones(64) for _ in range(3)]
    options = {"multiplier": 1.0, "eps": 1e-6, "stand_in": 0.0}
    combine(parts, total, *vectors, torch.zeros(64, 16), **options)
    combine(parts, None, *vectors, torch.zeros(64, 16), **options)


missing = compiling.Missing()
with planning(missing):
    run()
assert missing.compile() == 2 and compilations == [False, False], compilations
assert loaded == ["_combine_kernel"] * 4, loaded  # each launcher once for the cache, and once to use it
run()
assert len(compilations) == 2 and len(loaded) == 4, (compilations, loaded)
print("ready")
"""


def test_with_triton(tmp_path):
    """Triton itself compiles for a device that this machine has not, and the launches find what was compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _WITH_TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ready\n", done.stderr[-2000:]
