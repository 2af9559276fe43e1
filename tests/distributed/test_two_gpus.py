"""What the tests of DDP, FSDP2 and tensor parallel layers check on CPUs by gloo, on two GPUs by NCCL."""

from types import ModuleType

import pytest
import test_distributed as data_parallel
import test_sharded_layer as sharded_layer
import test_tensor_parallel as tensor_parallel
import torch
from helpers.accuracy import assert_equal
from helpers.cases import VARIANTS, Case
from helpers.distributed import NCCL, launch
from helpers.sharded import PLACEMENTS, styles
from helpers.training import Run

pytestmark = pytest.mark.gpu(2)
ON_GPUS = {"backend": NCCL, "timeout": 240}  # a fresh machine compiles every kernel

# ---- training ----

RUNS = {data_parallel: data_parallel.GPU_RUNS, tensor_parallel: tensor_parallel.RUNS_ON[2]}


@pytest.fixture(scope="module")  # runs once, also where it fails
def trained() -> dict[Run, tuple[dict, dict]]:
    """What the ranks got for each of RUNS."""
    results = {}
    for module, runs in RUNS.items():
        ranks = launch(module.train_all, 2, runs, "cuda", **ON_GPUS)
        results |= dict(zip(runs, zip(*ranks, strict=True), strict=True))
    return results


@pytest.mark.parametrize(
    "module, run",
    [pytest.param(module, run, id=str(run)) for module, runs in RUNS.items() for run in runs],
)
def test_five_steps_equal_those_of_one_process(trained, module: ModuleType, run: Run):
    first, second = trained[run]
    module.assert_as_on_one_process(first, run, "cuda")
    assert_equal(second, first)


# ---- layers ----

LAYERS = {
    f"{by}-{case}-{'detached' if detach_norm else 'exact'}-{backend}": (by, case, detach_norm, backend, 1.0)
    for by in PLACEMENTS
    for detach_norm in (False, True)
    for backend, dtype, size in (
        ("torch", torch.float64, (5, 41, 27, 3)),
        ("triton", torch.float32, (5, 41, 27, 3)),
        ("triton", torch.bfloat16, (257, 1408, 1024, 16)),
    )
    for case in (Case(*size, dtype=dtype, member=member, order=order) for member, order in VARIANTS)
}
LAYERS |= {  # a factor of the first magnitude, which is free, is not to leave float16's range
    f"{by}-{case}-times-{factor}-{backend}": (by, case, False, backend, factor)
    for by in PLACEMENTS
    for backend in ("torch", "triton")
    for factor in (1e-5, 1e4)
    for case in (Case(64, 320, 256, 8, dtype=torch.float16, order=order) for order in ("row_col", "col_row"))
}


@pytest.fixture(scope="module")
def failures() -> list[dict[str, str]]:
    return launch(sharded_layer.check_layers, 2, LAYERS, "cuda", **ON_GPUS)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_obeys_the_accuracy_rule(failures, name):
    for failures_of_rank in failures:
        assert name not in failures_of_rank, failures_of_rank[name]


@styles
def test_any_layout_of_input_and_output(style):
    launch(sharded_layer.check_layouts, 2, style, "cuda", **ON_GPUS)
