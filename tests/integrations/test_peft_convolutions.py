"""Convolutions of PEFT whose channels the update cancels: right to a fraction of what is left of them."""

import pytest
import torch
from helpers.cases import SCALING, dtypes
from helpers.convolutions import cancelled_factors, check, make
from torch import nn

pytest.importorskip("peft")
from helpers.peft_models import bora_layers, make_peft  # noqa: E402


@pytest.mark.usefixtures("float32_convolutions")
@dtypes
@pytest.mark.parametrize("name", ["1d-circular", "2d", "3d"])
def test_cancelled_channels(name, dtype, device):
    conv, x, dy = make(name, dtype, device)
    rank = 9
    factors = cancelled_factors(conv, ("row", "col"), 2e-3, rank=rank)
    model = make_peft(nn.Sequential(conv), r=rank, lora_alpha=SCALING * rank, target_modules=["0"])
    (layer,) = bora_layers(model).values()
    B = layer.lora_B["default"].weight
    assert B.dtype == torch.float32

    def through_peft(conv, **options):
        def call(x, *leaves):
            """The layer with these leaves in its parameters' place."""
            names = ["lora_A.default.weight", "lora_B.default.weight"]
            names += [f"lora_magnitude_vector_{axis}.default.weight" for axis in ("row", "col")]
            parameters = dict(zip(names, (leaves[0], leaves[1].view_as(B), *leaves[2:]), strict=True))
            return torch.func.functional_call(layer, parameters, (x,))

        return call

    check(conv, x, factors, dy, layer=through_peft)
