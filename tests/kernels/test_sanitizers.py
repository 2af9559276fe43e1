"""compute-sanitizer over one small case of each kernel: no access out of bounds, no race in shared memory."""

import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

SANITIZED = """
    import sys
    sys.path[:0] = {path!r}
    import torch
    from helpers.cases import Case, run
    from bora_kernels import bora_linear
    for case, dropout_p in (
        (Case(17, 123, 96, 8, dtype=torch.bfloat16), 0.0),
        (Case(33, 67, 61, 3, dtype=torch.float16, order="col_row"), 0.25),
        (Case(65, 72, 136, 17, dtype=torch.float32), 0.0),
        (Case(130, 264, 200, 16, dtype=torch.bfloat16, order="col_row"), 0.25),
        (Case(5, 40, 48, 3, dtype=torch.bfloat16, member="dora"), 0.0),
        (Case(70, 136, 264, 20, dtype=torch.bfloat16), 0.0),
        (Case(24, 136, 264, 100, dtype=torch.bfloat16), 0.0),
        (Case(24, 200, 136, 130, dtype=torch.bfloat16, order="col_row"), 0.0),
    ):
        results = run(
            bora_linear, case.inputs("cuda"), case.upstream("cuda"), backend="triton", scaling=0.5,
            norm_order=case.order, dropout_p=dropout_p, training=True,
        )
        assert all(value.isfinite().all() for value in results.values()), case
    torch.cuda.synchronize()
    print("finished")
"""


# Where a tile has fewer elements than a program has threads, several threads hold the same element and store the same
# value to the same word of shared memory: a write after a write by one and the same instruction, which is no race.
REPLICATED_STORE = re.compile(r"Race reported between Write access at (\S+) in .*\n=+ +and Write access at \1 in .*")


def reported_races(output):
    """The races of racecheck's report that are not stores of replicated values."""
    blocks = output.split("========= Error: ")[1:]
    return [block for block in blocks if not REPLICATED_STORE.match(block)]


def test_replicated_stores_are_told_from_races():
    report = (
        "========= Error: Race reported between Write access at _a_kernel+0x2bb0 in a.py:70\n"
        "=========     and {second} access at _a_kernel+{address} in a.py:70 [26 hazards]\n========= \n"
    )
    assert not reported_races(report.format(second="Write", address="0x2bb0"))
    assert len(reported_races(report.format(second="Write", address="0x2bc0"))) == 1
    assert len(reported_races(report.format(second="Read", address="0x2bb0"))) == 1


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    # Errors that the driver's calls return are raised in Python, but for the one that ends a list of parameters.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    script = textwrap.dedent(SANITIZED).format(path=sys.path)
    result = subprocess.run(
        ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "1", sys.executable, "-c", script],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = result.stdout[-4000:] + result.stderr[-4000:]
    assert "finished" in result.stdout and "SUMMARY" in result.stdout, output
    if tool == "racecheck":
        assert not reported_races(result.stdout), output
    else:
        assert result.returncode == 0, output
