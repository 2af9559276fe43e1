"""One linear layer: every provider on the same weight, input and adapter; the first call of a new shape."""

import json
import os
import subprocess
import sys

import pytest

from .cases import Case

LEVEL = "layer"

_FIRST_CALL = """
import sys, time, torch
from bora_kernels import FusedBoraLinear
N, K, M, R = map(int, sys.argv[1:])
layer = FusedBoraLinear(K, N, R, bias=False, device="cuda", dtype=torch.bfloat16)
x, dy = (torch.randn(M, size, device="cuda", dtype=torch.bfloat16) for size in (K, N))
x.requires_grad_()
(x @ layer.weight.T).backward(dy)  # CUDA and cuBLAS start here, for any layer
seconds = []
for _ in range(2):
    torch.cuda.synchronize()
    start = time.perf_counter()
    layer(x).backward(dy)
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
print(seconds)
"""


def test_layer(harness, benchmark, case, provider) -> None:
    harness.measure(case, provider, benchmark)


def test_first_call(harness, pytestconfig, tmp_path) -> None:
    """Seconds of a new process's first step, forward and backward, with no kernel compiled before."""
    option = pytestconfig.option
    if harness.device.type != "cuda":
        pytest.skip("kernels are compiled on CUDA devices only")
    if "step" not in (option.modes or "step") or "fused-bora" not in (option.providers or ["fused-bora"]):
        pytest.skip("fused-bora's step is not among what is measured")
    shape = (option.shapes or ["4096x4096"])[0]
    case = Case("layer", "first-call", shape, 1, (option.tokens or [8192])[0], (option.ranks or [16])[0], "bf16")
    if not case.matches(option.cases):
        pytest.skip("the first call is not among what is measured")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    sizes = [*shape.split("x"), str(case.length), str(case.rank)]
    with harness.recording(case, "fused-bora", "FusedBoraLinear") as record:
        command = [sys.executable, "-c", _FIRST_CALL, *sizes]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=pytestconfig.rootpath, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        record["first"], record["second"] = json.loads(done.stdout)
