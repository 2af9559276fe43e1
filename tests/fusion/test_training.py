"""Two hundred steps of a small Llama: fused, its losses are those of the model as it was, to rounding."""

import copy

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.fused_models import blocks_that_run, peft, twins
from helpers.peft_models import VOCABULARY, make_base

from bora_kernels import convert

STEPS, BATCHES = 200, 4
MODELS = {
    "bora": lambda base: convert(base, r=3, alpha=5),
    "lora": lambda base: peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear")),
    "dora": lambda base: peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", use_dora=True)),
}


def losses(model, device):
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
    batches = torch.randint(VOCABULARY, (BATCHES, 2, 12), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for step in range(STEPS):
        ids = batches[step % BATCHES]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return {"losses": torch.stack(found)}


@pytest.mark.parametrize(
    "make", [pytest.param(make, id=kind, marks=[pytest.mark.slow] * (kind != "bora")) for kind, make in MODELS.items()]
)
def test_losses_of_two_hundred_steps(make, device, monkeypatch):
    model = make(make_base())
    model.get_output_embeddings().weight.data *= 8  # of a head that was drawn, which does not learn
    fused, plain = twins(model)
    exact = losses(copy.deepcopy(plain).double(), device)
    calls = blocks_that_run(monkeypatch)
    found, expected = losses(fused, device), losses(plain, device)
    assert min(calls["gated_mlp"], calls["shared_input"]) >= 2 * STEPS
    assert exact["losses"][-BATCHES:].mean() < 0.8 * exact["losses"][:BATCHES].mean()  # it learns
    assert_accurate(found, expected, exact, samples=STEPS, floor=5e-6)
