"""Norms and norm paths from the kernels' sums, beside those that PyTorch operations make of V."""

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.cases import SCALING, VARIANTS, Case, require

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.contract import COMPLETE, Adapter, Options
from bora_kernels.ops.sharded.norms import add_norm_paths, norms_and_scales

N, K, R = 37, 53, 3
NAMES = ("row_norm", "row_scale", "col_norm", "col_scale", "dm_row", "dm_col", "dA", "dB")


def evaluate(backend: str, inputs: dict, order: str, dtype: torch.dtype, complete) -> dict[str, torch.Tensor]:
    """Everything that the functions return, computed in ``dtype`` from the same gradients."""
    weight = inputs["weight"].to(dtype)
    adapter = Adapter(*(None if inputs[name] is None else inputs[name].to(dtype) for name in Adapter._fields))
    options = Options(SCALING, order, backend=backend)
    scales = norms_and_scales(weight, adapter, options, COMPLETE)
    generator = torch.Generator(weight.device).manual_seed(5)
    dm_row, dm_col, dA, dB = (
        torch.randn(size, generator=generator, device=weight.device).to(dtype) for size in ((N,), (K,), (R, K), (N, R))
    )
    row, col = adapter.members
    paths = add_norm_paths(
        weight, adapter, scales, dm_row if row else None, dm_col if col else None, dA, dB, options, complete
    )
    return {name: t for name, t in zip(NAMES, (*scales[:4], *paths), strict=True) if t is not None}


@pytest.mark.parametrize("special", ["", "zero magnitudes", "zero rows and columns"])
@pytest.mark.parametrize("member, order", [variant for variant in VARIANTS if variant[0] != "lora"])
@pytest.mark.parametrize("completed", [False, True], ids=["whole", "completed"])
def test_kernels_and_operations_agree(member, order, completed, special, device):
    require("triton", torch.float32)
    inputs = Case(4, N, K, R, member=member).inputs(device)
    if special == "zero rows and columns":  # of V
        inputs["weight"][3], inputs["lora_B"][3] = 0.0, 0.0
        inputs["weight"][:, 5], inputs["lora_A"][:, 5] = 0.0, 0.0
    if special == "zero magnitudes":
        for name, zeros in (("magnitude_row", slice(4)), ("magnitude_col", slice(5, 7))):
            if inputs[name] is not None:
                inputs[name][zeros] = -0.0
    complete = (lambda sums: 2 * sums) if completed else None
    exact = evaluate("torch", inputs, order, torch.float64, complete)
    plain = evaluate("torch", inputs, order, torch.float32, complete)
    actual = evaluate("triton", inputs, order, torch.float32, complete)
    assert_accurate(actual, plain, exact, samples=N)
    assert all(torch.isfinite(t).all() for t in actual.values())
