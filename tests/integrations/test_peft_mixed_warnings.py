"""Adapters that cancel lines of a weight, in batches of several by PEFT: warned of once, without waiting for a GPU."""

import warnings

import pytest
import torch

pytest.importorskip("peft")
from helpers.peft_models import bora_layers, make_base, make_ids, make_peft, train_a_little
from torch import nn

import bora_kernels
from bora_kernels.integrations.peft import BoraConfig
from bora_kernels.serving import cancelled, entry

NAMES = ["undo", "__base__", "default"]
IDS = make_ids(len(NAMES))


@torch.no_grad()
def cancel(model: nn.Module, name: str = "undo") -> None:
    """Let an adapter leave a tenth of a row of each weight."""
    for layer in bora_layers(model).values():
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        B.zero_()
        A[0] = layer.base_layer.weight[3]
        B[3, 0] = -0.9 / layer.full_scaling[name]


def cancelling(*names: str) -> nn.Module:
    """A model of two layers, with an ordinary adapter and those of these names, which cancel."""
    model = make_peft(make_base(), target_modules=["q_proj"]).eval()
    for seed, name in enumerate(("default", *names)):
        if name != "default":
            model.add_adapter(name, BoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
        train_a_little(model, name, seed)
    for name in names:
        cancel(model, name)
    return model.requires_grad_(False)


@pytest.fixture(autouse=True)
def nothing_open():
    cancelled._open.clear()
    yield
    cancelled._open.clear()


def warned(model: nn.Module, names=NAMES, calls: int = 1) -> list[str]:
    """The adapters that so many calls warn of."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(calls):
            model(IDS[: len(names)], adapter_names=names)
    said = [str(warning.message) for warning in caught if "leaves less than half" in str(warning.message)]
    return sorted(message.split("'")[1] for message in said)


@pytest.mark.parametrize("in_scope", [False, True])
def test_an_adapter_is_warned_of_once_for_each_layer_and_state(in_scope):
    model = cancelling("undo", "more")
    with bora_kernels.reuse_scales() if in_scope else torch.no_grad():
        assert warned(model, calls=3) == ["undo"] * 2
        assert warned(model, ["undo", "more", "more"], calls=2) == ["more"] * 2
        with torch.no_grad():
            for layer in bora_layers(model).values():
                layer.lora_B["undo"].weight.mul_(1.01)
        assert warned(model, calls=2) == ["undo"] * 2
        with torch.no_grad():
            for layer in bora_layers(model).values():
                layer.lora_B["undo"].weight.zero_()
        assert warned(model, calls=2) == []


def test_an_adapter_that_comes_again_is_asked_again_and_none_that_left_is_remembered():
    model = cancelling("undo")
    assert warned(model) == ["undo"] * 2
    for swap in range(6):
        model.delete_adapter("undo" if swap == 0 else f"swap{swap - 1}")
        model.add_adapter(f"swap{swap}", BoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
        cancel(model, f"swap{swap}")
        model.requires_grad_(False)
        assert warned(model, [f"swap{swap}", "default"]) == [f"swap{swap}"] * 2
        assert all(set(cancelled._asked[layer]) == {"default", f"swap{swap}"} for layer in bora_layers(model).values())


class Event:
    """Of a device that answers when it is told to."""

    arrived = False

    def query(self) -> bool:
        return Event.arrived


@pytest.fixture
def far(monkeypatch):
    """A device whose numbers take their time, and the times that somebody looked at a number."""
    looks: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "cpu", "numpy"):
        plain = getattr(torch.Tensor, name)

        def look(self, *args, plain=plain, name=name, **kwargs):
            looks.append(name)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, look)
    monkeypatch.setattr(Event, "arrived", False)
    monkeypatch.setattr(cancelled, "_is_far", lambda word: True)
    monkeypatch.setattr(cancelled, "_send", lambda word: (word.clone(), Event()))
    return looks


class Two(nn.Module):
    """Two layers, and nothing else that might look at a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.q_proj = nn.Linear(12, 20), nn.Linear(20, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(self.first(x).relu())


def two_layers() -> nn.Module:
    model = make_peft(Two(), target_modules=["first", "q_proj"]).eval()
    model.add_adapter("undo", BoraConfig(r=2, lora_alpha=6, target_modules=["first", "q_proj"]))
    cancel(model)
    return model.requires_grad_(False)


def test_no_call_waits_and_the_warning_comes_with_a_later_one(far, monkeypatch):
    model, x = two_layers(), torch.randn(3, 12)
    judged = []
    plain = entry.norms_and_scales
    monkeypatch.setattr(entry, "norms_and_scales", lambda *a, **kw: judged.append(kw["judge"]) or plain(*a, **kw))
    far.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(x, adapter_names=NAMES)
    assert not far
    assert len(cancelled._open) == 4, "two adapters of two layers, asked once"
    assert judged == [True] * 4 + [False] * 8
    Event.arrived = True
    with pytest.warns(UserWarning, match=r"adapter 'undo' leaves less than half .* of a weight \[") as caught:
        model(x, adapter_names=NAMES)
    assert ["[20, 12]" in str(w.message) for w in caught] == [True, False] and not cancelled._open
    assert far == ["tolist"] * 4  # numbers that are there


def test_what_a_capture_cannot_ask_is_asked_after_it(monkeypatch):
    model = cancelling("undo")
    monkeypatch.setattr(cancelled, "_is_capturing", lambda: True)
    assert warned(model, calls=2) == []
    monkeypatch.undo()
    assert warned(model, calls=2) == ["undo"] * 2


def test_another_parameter_over_the_same_memory_enters_anew():
    """Both are alive, lie at one address and have the same version."""
    model, names = cancelling(), ["default", "__base__", "default"]
    layer = next(iter(bora_layers(model).values()))
    old = layer.lora_A["default"].weight = nn.Parameter(torch.randn_like(layer.lora_A["default"].weight), False)
    with bora_kernels.reuse_scales(), torch.no_grad():
        before = model(IDS, adapter_names=names).logits
        layer.lora_A["default"].weight = nn.Parameter(old.data, False)
        assert layer.lora_A["default"].weight._version == old._version
        assert torch.equal(model(IDS, adapter_names=names).logits, before)


@pytest.mark.gpu
def test_no_call_waits_for_a_gpu():
    model, x = two_layers().cuda(), torch.randn(3, 12, device="cuda")
    model(x, adapter_names=["default"] * 3)  # libraries wait when they are loaded
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="adapter 'undo' leaves less than half"):  # by the second call at the latest
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x, adapter_names=NAMES)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        model(x, adapter_names=NAMES)
