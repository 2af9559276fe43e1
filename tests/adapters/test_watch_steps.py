"""Warnings at an optimizer's steps: adapters that it lacks, merged layers, weight decay of magnitudes."""

import warnings

import pytest
import torch
from torch import nn

from bora_kernels import convert, parameter_groups
from bora_kernels.ops import watch

WIDTH = 6


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(watch, "_said", set())


def network():
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))


def adapt(model, way):
    if way == "convert":
        return convert(model, r=2)
    peft = pytest.importorskip("peft")
    from bora_kernels.integrations.peft import BoraConfig

    return peft.get_peft_model(model, BoraConfig(r=2, target_modules=["0", "2"]))


def steps(model, *optimizers, count=3):
    """What is said while a model is trained."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            loss = model(torch.randn(3, WIDTH, requires_grad=True)).square().sum()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return [str(w.message) for w in caught]


ways = pytest.mark.parametrize("way", ["convert", "peft"])


# ---- optimizers without the adapters ----


@ways
@pytest.mark.parametrize("head", [False, True])
def test_an_optimizer_from_before_the_model_was_adapted_is_warned_of_once(way, head):
    model = network()
    if head:
        model.append(nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model = convert(model, r=2, target_modules=["0", "2"]) if way == "convert" else adapt(model, way)
    for parameter in (model[3] if way == "convert" else model.base_model.model[3]).parameters() if head else ():
        parameter.requires_grad_()
    said = steps(model, optimizer)
    assert len(said) == 1 and "an optimizer holds weights of 0, 2, which are frozen" in said[0]
    assert "make the optimizer after the model was adapted" in said[0]


@ways
def test_frozen_weights_beside_adapters_here_or_in_another_optimizer_are_no_problem(way):
    model = adapt(network(), way)
    assert not steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert not steps(model, torch.optim.SGD(frozen, lr=0.1), torch.optim.Adam(trained))


def test_adapters_that_are_frozen_on_purpose_are_not_missed():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, r=2).requires_grad_(False)
    assert not steps(model, optimizer)


# ---- merged layers ----


def merge(model, way):
    if way == "convert":
        model[2].merge()
    else:
        model.base_model.model[2].merge()


@ways
def test_layers_that_train_on_while_they_are_merged_are_warned_of_once(way):
    model = adapt(network(), way)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert not steps(model, optimizer)
    merge(model, way)
    said = steps(model, optimizer)
    assert len(said) == 1 and "2 were called in training while they are merged" in said[0]


@ways
def test_a_layer_that_is_merged_at_the_first_step_is_named_as_such(way):
    model = adapt(network(), way)
    merge(model, way)
    said = steps(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert len(said) == 1 and "2 were called in training while they are merged" in said[0]


@ways
def test_evaluation_of_merged_layers_between_steps_says_nothing(way):
    model = adapt(network(), way)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    merge(model, way)
    with torch.no_grad():
        model(torch.randn(2, WIDTH))
    assert not steps(model.eval(), count=1)
    model.train()(torch.randn(2, WIDTH))
    layer = model[2] if way == "convert" else model.base_model.model[2]
    layer.unmerge()
    assert not steps(model, optimizer)


# ---- weight decay ----


@ways
def test_weight_decay_of_magnitudes_is_warned_of(way):
    model = adapt(network(), way)
    trained = [p for p in model.parameters() if p.requires_grad]
    said = steps(model, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.3))
    assert len(said) == 1 and "weight decay of 0.3 pulls magnitudes towards zero" in said[0]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    for fitting in (trained, parameter_groups(model, 1e-3, weight_decay=0.3), groups):
        assert not steps(model, torch.optim.AdamW(fitting, lr=1e-3))  # at the first its own 0.01
