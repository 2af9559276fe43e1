"""What only a GPU shows of models: compilation by inductor, and training beside the reference."""

import copy

import pytest
import torch
from helpers.cases import HALVES, NAMES, orders
from torch import nn

from bora_kernels import FusedBoraLinear

pytestmark = pytest.mark.gpu

BF16, _ = HALVES
DEVICE = "cuda"


def test_compiled_by_inductor():
    torch.compiler.reset()
    module = FusedBoraLinear(384, 512, r=16, device=DEVICE, dtype=BF16)
    nn.init.normal_(module.lora_B)
    compiled = torch.compile(module, fullgraph=True)
    trained = [p for p in module.parameters() if p.requires_grad]
    for tokens in (64, 100, 256):
        x = torch.randn(tokens, 384, device=DEVICE, dtype=BF16, requires_grad=True)
        dy = torch.randn(tokens, 512, device=DEVICE, dtype=BF16)
        results = []
        for call in (module, compiled):
            y = call(x)
            results.append([y, *torch.autograd.grad(y, [x, *trained], dy)])
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=NAMES.get)
@orders
def test_200_training_steps_follow_the_reference(dtype, order):
    x = torch.randn(512, 128, device=DEVICE).to(dtype)
    target = torch.randn(512, 64, device=DEVICE)
    options = {"r": 8, "norm_order": order, "device": DEVICE, "dtype": dtype}
    start = nn.Sequential(FusedBoraLinear(128, 256, **options), nn.GELU(), FusedBoraLinear(256, 64, **options))
    losses = {}
    for backend in ("triton", "reference"):
        model = copy.deepcopy(start)
        model[0].backend = model[2].backend = backend
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        values = []
        for _ in range(200):
            loss = (model(x).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        losses[backend] = torch.stack(values)
    assert losses["reference"][-1] < 0.8 * losses["reference"][0]
    torch.testing.assert_close(losses["triton"], losses["reference"], rtol=2e-2, atol=0)
