"""Layers on a GPU whose results are the same bits every time, scripts in processes of their own, and threads."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import torch
from torch import nn

from bora_kernels import FusedBoraLinear

from .cases import HALVES

DEVICE, BF16 = "cuda", HALVES[0]


def layer(K=192, N=256, r=16, dtype=BF16, **options):
    module = FusedBoraLinear(K, N, r=r, dtype=dtype, device=DEVICE, **options)
    nn.init.normal_(module.lora_B, std=0.05)
    module.backend = "triton"
    return module


def data(M=64, K=192, N=256, dtype=BF16):
    x = torch.randn(M, K, device=DEVICE).to(dtype).requires_grad_()
    return x, torch.randn(M, N, device=DEVICE).to(dtype)


def step(module, x, dy, between=lambda y: None):
    y = module(x)
    between(y)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]


def in_a_thread(function):
    results = []

    def work():
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


# PyTorch's autograd threads may still hold Python objects while the interpreter shuts down right after a backward: now
# and then the process ends with "terminate called without an active exception", of a plain autograd.Function as well.
END = """
import os, sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def run_script(script):
    """A script in a process of its own, which ends after its last line and leaves out the interpreter's shutdown."""
    command = [sys.executable, "-c", textwrap.dedent(script) + END]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def assert_runs(script):
    done = run_script(script)
    assert done.returncode == 0, done.stderr[-2000:]
