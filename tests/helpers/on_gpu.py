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


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


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


def assert_runs(script):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
