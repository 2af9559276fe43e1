"""``warm_up`` plans every kernel that a model's layers launch later, and changes nothing else."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs triton")

import bora_kernels
from bora_kernels import FusedBoraLinear, FusedDoraLinear, convert, warm_up
from bora_kernels.adapters import warm_up as module
from bora_kernels.ops import reuse
from bora_kernels.replay import compiling, replay_disabled
from bora_kernels.replay.recording import planning


@pytest.fixture
def compiled(monkeypatch) -> Counter:
    """Which kernels are compiled; layers on the CPU count as on a device, and no kernel was met before."""
    if torch.cuda.is_available():
        pytest.skip("plays a device")
    counter: Counter = Counter()
    monkeypatch.setattr(compiling, "_known", set())
    monkeypatch.setattr(compiling, "compile_kernel", lambda kernel, *_: counter.update([kernel.fn.__name__]))
    monkeypatch.setattr(compiling, "share_cache", lambda *_: None)
    monkeypatch.setattr(module, "_is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    return counter


def missing_in(layer: nn.Module, tokens: tuple[int, ...], in_features: int, grad: bool = True) -> set[str]:
    """Kernels of a call, and of its backward, that were not compiled."""
    missing = compiling.Missing()
    dtype = next(layer.parameters()).dtype
    with replay_disabled(), planning(missing), torch.set_grad_enabled(grad):
        y = layer(torch.randn(*tokens, in_features, dtype=dtype, requires_grad=grad))
        if grad:
            y.backward(torch.randn_like(y))
    return {launch.kernel.fn.__name__ for launch in missing.launches.values()}


def model(dtype: torch.dtype = torch.float32, **options) -> nn.Sequential:
    base = nn.Sequential(nn.Linear(80, 48, dtype=dtype), nn.Linear(48, 112, bias=False, dtype=dtype))
    converted = convert(base, r=8, alpha=8, **options)
    for layer in converted:
        layer.backend = "triton"
    return converted


OPTIONS = [
    {},
    {"method": "dora", "detach_norm": True},
    {"method": "columns"},
    {"norm_order": "col_row", "dropout": 0.1},
    {"adapter_dtype": torch.bfloat16, "dtype": torch.bfloat16},
    {"dtype": torch.float16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "bora")
@pytest.mark.parametrize("tokens", [(2, 32), (33,)], ids=str)
def test_no_kernel_of_a_step_is_missing(compiled, options, tokens):
    layers = model(**options)
    assert missing_in(layers, tokens, 80)  # or the test says nothing
    rows = torch.Size(tokens).numel()
    assert warm_up(layers.train(), rows) == compiled.total() > 0
    assert {"_project_kernel", "_reduce_kernel", "_scaled_gemm_kernel"} < compiled.keys()
    assert not missing_in(layers, tokens, 80)
    assert not missing_in(layers, tokens, 80, grad=False)  # as under checkpointing
    layers.zero_grad()
    assert warm_up(layers, [rows, rows]) == 0


def test_eval_mode_needs_no_backward(compiled):
    layers = model().eval()
    assert warm_up(layers, [64]) > 0 and "_reduce_kernel" not in compiled
    assert not missing_in(layers, (64,), 80, grad=False)
    assert "_reduce_kernel" in missing_in(layers.train(), (64,), 80)


def test_several_numbers_of_tokens(compiled):
    """One that is no multiple of 16 has kernels of its own, and one so small that a projection is made in parts."""
    layers = model()
    warm_up(layers, 128)
    assert missing_in(layers, (33,), 80) and not missing_in(layers, (640,), 80)
    assert warm_up(layers, iter([128, 33])) > 0
    assert not missing_in(layers, (47,), 80)


def test_nothing_else_changes(compiled):
    layers = model(dropout=0.5)
    calls = []
    layers[0].register_forward_hook(lambda *_: calls.append("forward"))
    layers[1].lora_A.requires_grad_(False)
    state = {name: value.clone() for name, value in layers.state_dict().items()}
    versions = [parameter._version for parameter in layers.parameters()]
    random = torch.get_rng_state()
    with bora_kernels.reuse_scales():
        warm_up(layers, 32)
        assert not any(map(len, reuse._scopes))  # no scales of a run that computed none
    assert torch.equal(torch.get_rng_state(), random) and not calls
    assert all(parameter.grad is None for parameter in layers.parameters())
    assert [parameter._version for parameter in layers.parameters()] == versions
    for name, value in layers.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_what_has_no_kernels_is_left_out(compiled, monkeypatch):
    """Merged layers, the PyTorch backend, plain layers; and all of them without a GPU."""
    layers = model()
    layers[0].backend = "torch"
    layers[1].merge()
    assert warm_up(nn.Sequential(layers, nn.Linear(4, 4)), 32) == 0
    monkeypatch.undo()
    assert warm_up(model(), 32) == 0


@pytest.mark.parametrize("kind", ["bora", "fused lora", "fused dora"])
def test_layers_of_peft(compiled, monkeypatch, kind):
    """BoRA's layers for PEFT, and PEFT's own: once they are fused, and not before."""
    peft = pytest.importorskip("peft")
    from bora_kernels.integrations.peft import BoraConfig
    from bora_kernels.ops import validation

    monkeypatch.setattr(validation, "choose_backend", lambda *_: "triton")
    config = BoraConfig if kind == "bora" else peft.LoraConfig
    options = {"r": 8, "target_modules": ["0"]} | ({"use_dora": True} if kind == "fused dora" else {})
    adapted = peft.get_peft_model(nn.Sequential(nn.Linear(80, 48)), config(**options)).train()
    layer = adapted.base_model.model[0]
    if kind == "bora":
        layer.backend = "triton"
    else:
        assert warm_up(adapted, 32) == 0
        bora_kernels.fuse(adapted)
    assert missing_in(layer, (32,), 80)
    assert warm_up(adapted, 32) > 0
    assert not missing_in(layer, (32,), 80) and not missing_in(layer, (32,), 80, grad=False)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3, 8), TypeError, "model must be a torch.nn.Module, got int"),
        ((nn.Linear(2, 2), 0), ValueError, "tokens must be positive, got 0"),
        ((nn.Linear(2, 2), [8, 1.5]), TypeError, "tokens must be an int or several, got float"),
        ((nn.Linear(2, 2), True), TypeError, "tokens must be an int or several, got bool"),
    ],
    ids=["model", "zero", "float", "bool"],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        warm_up(*arguments)


def test_layers_of_one_class_each(compiled):
    """A layer by itself is a model, too."""
    for kind in (FusedBoraLinear, FusedDoraLinear):
        layer = kind(64, 32, 4)
        layer.backend = "triton"
        assert warm_up(layer, 16) > 0
        assert not missing_in(layer, (16,), 64)
