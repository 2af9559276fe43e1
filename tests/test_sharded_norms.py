"""Norms and norm paths from the kernels' sums, beside those that PyTorch operations make of V."""

import pytest
import torch
from accuracy import assert_accurate
from cases import SCALING, VARIANTS, Case, require

pytest.importorskip("triton", reason="needs triton")

from bora_kernels import adapted_weight
from bora_kernels.distributed import norms
from bora_kernels.plan import EPS

N, K, R = 37, 53, 3
NAMES = ("row_norm", "row_scale", "col_norm", "col_scale", "S", "D", "dA", "dB")


def evaluate(module, inputs: dict, order: str, dtype: torch.dtype, complete=None) -> dict[str, torch.Tensor]:
    """Everything that the functions of ``module`` return, computed in ``dtype``."""
    weight, *adapter = (
        None if inputs[name] is None else inputs[name].to(dtype)
        for name in ("weight", "lora_A", "lora_B", "magnitude_row", "magnitude_col")
    )
    options = {"scaling": SCALING, "norm_order": order, "eps": EPS}
    scales = module.norms_and_scales(weight, *adapter, **options)
    has_col = scales.col_norm is not None
    generator = torch.Generator(weight.device).manual_seed(5)
    S, D = (torch.randn(size, generator=generator, device=weight.device).to(dtype) for size in (N, K))
    paths = module.norm_paths(
        weight, *adapter[:2], scales, S, D if has_col else None, order, SCALING, EPS, complete_first=complete
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
        inputs["magnitude_row"][:4] = 0.0
        if inputs["magnitude_col"] is not None:
            inputs["magnitude_col"][5:7] = -0.0
    complete = (lambda sums: 2 * sums) if completed else None
    exact = evaluate(adapted_weight, inputs, order, torch.float64, complete)
    plain = evaluate(adapted_weight, inputs, order, torch.float32, complete)
    actual = evaluate(norms, inputs, order, torch.float32, complete)
    assert_accurate(actual, plain, exact, samples=N)
    assert all(torch.isfinite(t).all() for t in actual.values())
