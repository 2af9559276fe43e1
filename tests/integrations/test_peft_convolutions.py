"""Convolutions of PEFT whose channels the update cancels: right to a fraction of what is left of them."""

import pytest
import torch
from helpers.cases import SCALING, dtypes
from helpers.convolutions import cancelled_factors, check_together, make
from torch import nn

pytest.importorskip("peft")
from helpers.peft_models import bora_layers, make_peft  # noqa: E402


@pytest.mark.usefixtures("float32_convolutions")
@dtypes
@pytest.mark.parametrize("name", ["1d-circular", "2d", "3d"])
def test_cancelled_channels(name, dtype, device):
    made, rank, lines = [make(name, dtype, device) for _ in range(9)], 9, ("row", "col")
    layers = [(conv, x, cancelled_factors(conv, lines, 2e-3, rank=rank), dy) for conv, x, dy in made]

    def through_peft(conv, **options):
        model = make_peft(nn.Sequential(conv), r=rank, lora_alpha=SCALING * rank, target_modules=["0"])
        (layer,) = bora_layers(model).values()
        B = layer.lora_B["default"].weight
        assert B.dtype == torch.float32

        def call(x, *leaves):
            """The layer with these leaves in its parameters' place."""
            names = ["lora_A.default.weight", "lora_B.default.weight"]
            names += [f"lora_magnitude_vector_{axis}.default.weight" for axis in ("row", "col")]
            parameters = dict(zip(names, (leaves[0], leaves[1].view_as(B), *leaves[2:]), strict=True))
            return torch.func.functional_call(layer, parameters, (x,))

        return call

    check_together(layers, lines, layer=through_peft)
