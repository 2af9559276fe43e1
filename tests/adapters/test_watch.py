"""Warnings about training: adapted layers that no gradient reaches, and magnitudes narrower than float32."""

import copy
import warnings

import pytest
import torch
from torch import nn

from bora_kernels import FusedBoraLinear, convert
from bora_kernels.ops import calls, watch

WIDTH = 6


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(watch, "_said", set())
    monkeypatch.setattr(calls, "_prepared", {})


class Reader(nn.Module):
    """Calls ``called``, and multiplies by the weight of ``read`` as a fused operator would."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.called, self.read = (nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(2))

    def forward(self, x):
        return self.called(x) @ self.read.weight.T


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return convert(nn.Sequential(Reader(dtype), Reader(dtype)), r=2, **options)


def step(model, optimizer=None, dtype=torch.float32):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(3, WIDTH, dtype=dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def messages(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught]


# ---- layers that take no part ----


@pytest.mark.parametrize("method", ["bora", "dora"])
def test_layers_that_a_step_never_called_are_named_once(method):
    model = make(method=method)
    with pytest.warns(UserWarning, match=r"2 of 4 adapted layers took no part .*: 0.read, 1.read\. ") as caught:
        optimizer = step(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert not messages(lambda: [step(model, optimizer) for _ in range(3)])


def test_a_layer_that_was_left_out_is_not_named():
    assert not messages(lambda: step(make(exclude=["read"])))


def test_a_step_without_gradients_says_nothing_and_the_next_one_is_looked_at():
    model = make(exclude=["0.read"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not messages(optimizer.step)
    assert "1 of 3 adapted layers took no part in this training step" in messages(lambda: step(model, optimizer))[0]


def test_frozen_layers_and_those_of_another_optimizer_are_none_of_its_business():
    model = make()
    for layer in (model[0].read, model[1].read):
        layer.requires_grad_(False)
    assert not messages(lambda: step(model))
    model = make()
    called = [p for block in model for p in block.called.parameters() if p.requires_grad]
    assert not messages(lambda: step(model, torch.optim.Adam(called)))


def test_copies_are_looked_at_too():
    model = copy.deepcopy(make())
    assert "0.read, 1.read" in messages(lambda: step(model))[0]


def test_many_layers_are_counted():
    torch.manual_seed(0)
    model = convert(nn.Sequential(*(Reader() for _ in range(9))), r=1)
    assert "9 of 18 adapted layers" in (text := messages(lambda: step(model))[0]) and "4.read and 4 more" in text


def test_a_gradient_scaler_and_checkpointing_change_nothing():
    model = make(exclude=["read"])
    x = torch.randn(3, WIDTH, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).sum().backward()
    assert not messages(optimizer.step)


# ---- magnitudes ----


def narrowed_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


NARROWED = {
    "to": lambda: make().to(torch.bfloat16),
    "half-over-bf16": lambda: make(torch.bfloat16).half(),
    "data": lambda: narrowed_data(make(torch.bfloat16)),
    "copy": lambda: copy.deepcopy(make(torch.bfloat16).to(torch.bfloat16)),
    "dora": lambda: make(torch.bfloat16, method="dora").to(torch.bfloat16),
}


@pytest.mark.parametrize("narrowed", NARROWED.values(), ids=NARROWED)
def test_narrowed_magnitudes_are_warned_of_at_the_first_call(narrowed):
    model = narrowed()
    dtype = model[0].called.magnitude_row.dtype
    x = torch.randn(3, WIDTH + 1, dtype=dtype)[:, 1:]
    with pytest.warns(UserWarning, match=rf"The magnitudes of 0.called are {dtype}: .*adapter_dtype") as caught:
        model(x)
        model(x[:2])
    assert len(caught) == 1


def test_what_a_call_did_not_see_is_seen_by_the_step():
    """An optimizer of narrowed parameters whose gradients came from elsewhere."""
    model = narrowed_data(make(torch.bfloat16, exclude=["read"]))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    text = messages(torch.optim.SGD(model.parameters(), lr=0.1).step)
    assert len(text) == 1 and "magnitudes of 0.called, 1.called are torch.bfloat16" in text[0]


def test_what_was_chosen_is_no_surprise():
    chosen = make(torch.bfloat16, adapter_dtype=torch.bfloat16, exclude=["read"])
    assert not messages(lambda: step(chosen, dtype=torch.bfloat16))
    wide = make(torch.bfloat16, exclude=["read"])
    assert not messages(lambda: step(wide, dtype=torch.bfloat16))
    by_hand = FusedBoraLinear(WIDTH, 4, dtype=torch.float16, adapter_dtype=torch.float16)
    assert not messages(lambda: by_hand(torch.randn(2, WIDTH).half()))


def test_the_remedy_that_the_warning_names_works():
    model = make(torch.bfloat16, exclude=["read"]).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data = parameter.data.float()
    assert not messages(lambda: step(model, dtype=torch.bfloat16))
