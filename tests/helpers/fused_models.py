"""Tiny models for ``fuse``, and their losses and gradients beside those of the same model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.peft_models import make_base, make_ids, train_a_little
from torch import Tensor, nn

from bora_kernels import convert, fuse
from bora_kernels.contract import Adapter
from bora_kernels.fusion import layers, mlp, normed, shared

peft = pytest.importorskip("peft")

VARIANTS = {"lora": {}, "dora": {"use_dora": True}}
variants = pytest.mark.parametrize("variant", VARIANTS)


def peft_model(variant: str = "lora", kind: str = "llama", *, base: nn.Module | None = None, **options) -> nn.Module:
    """A model with PEFT's own layers, moved off their start."""
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **VARIANTS[variant], **options}
    )
    return train_a_little(peft.get_peft_model(make_base(kind) if base is None else base, config))


def converted(base: nn.Module | None = None, **options) -> nn.Module:
    """A Llama of two layers, converted and off its start."""
    model = convert(make_base() if base is None else base, **{"r": 3, "alpha": 5, **options})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                change = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + 0.1 * change) if parameter.ndim == 1 else parameter + 0.1 * change)
    return model


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model fused, and a copy as it was."""
    plain = copy.deepcopy(model)
    return fuse(model), plain


def _noting(monkeypatch: pytest.MonkeyPatch, place: object, name: str, note: Callable[..., None]) -> None:
    """Calls ``note`` with the arguments of each call of a function."""
    inner = getattr(place, name)

    def call(*args):
        note(*args)
        return inner(*args)

    monkeypatch.setattr(place, name, call)


def blocks_that_run(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each block runs from here on."""
    made = {"gated_mlp": 0, "shared_input": 0, "rms_norm": 0}

    def counting(name):
        def note(*args):
            made[name] += 1

        return note

    for place, name in ((mlp, "gated_mlp"), (shared, "shared_input"), (normed, "rms_norm")):
        _noting(monkeypatch, place, name, counting(name))
    return made


def adapters_that_run(monkeypatch: pytest.MonkeyPatch) -> list[Adapter]:
    """The adapters that run on this package's kernels from here on, alone or in a block."""
    made: list[Adapter] = []
    adapters = [
        (layers, "adapted_linear", lambda x, weight, adapter, *_: [adapter]),
        (mlp, "gated_mlp", lambda x, *members: [member.adapter for member in members[:3]]),
        (shared, "shared_input", lambda x, members, origin: [member.adapter for member in members]),
    ]
    for place, name, of in adapters:
        _noting(monkeypatch, place, name, lambda *args, of=of: made.extend(of(*args)))
    return made


def results(model: nn.Module, ids: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Logits and every gradient of a step on these tokens."""
    ids = make_ids() if ids is None else ids
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(input_ids=ids, labels=ids)
    if output.loss.requires_grad:
        output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_same_results(fused: nn.Module, plain: nn.Module, run: Callable[..., dict[str, Tensor]] = results) -> None:
    """The fused model's results err from float64's no more than those of the model as it was."""
    exact = {name: t.double() for name, t in run(copy.deepcopy(plain).double()).items()}
    assert_accurate(run(fused), run(plain), exact, samples=16, floor=2e-6)


def assert_close(fused: nn.Module, plain: nn.Module, run: Callable[..., dict[str, Tensor]] = results) -> None:
    """The same results, random numbers too, but for how a norm before the layers is rounded."""
    found, expected = run(fused), run(plain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()), msg=name)
