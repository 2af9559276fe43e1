"""explain, and the warning when a CUDA layer does not run on the kernels."""

import warnings

import pytest
import torch
from helpers.quantized_layers import FOUR_BIT, kinds, quantized_linear
from torch import nn

from bora_kernels import convert, explain
from bora_kernels.ops import validation


def model(layers=2, **options):
    block = lambda: nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})  # noqa: E731
    stack = nn.ModuleDict({"layers": nn.ModuleList([block() for _ in range(layers)]), "lm_head": nn.Linear(8, 5)})
    return convert(stack, r=2, **options)


@pytest.fixture
def cuda(monkeypatch):
    """A model that appears to be on a GPU."""
    monkeypatch.setattr(validation, "_warned", set())
    monkeypatch.setattr(validation, "triton_problem", lambda device, dtype: None)
    return torch.device("cuda", 0)


def reasons(explanation):
    return {(layer.backend, layer.reason) for layer in explanation.layers}


def test_table_groups_layers_and_names_backends():
    lines = str(explain(model(layers=12, method="dora"))).splitlines()
    assert lines[0].split() == ["layer", "class", "weight", "rank", "dtype", "device", "backend", "because"]
    up = ["layers.*.up", "12×", "FusedDoraLinear", "12×8", "2", "float32", "cpu", "torch", "it is the default on cpu"]
    assert lines[1].split(maxsplit=8) == up
    assert lines[2].startswith("layers.*.down") and len(lines) == 4
    assert lines[3] == "adapted layers: 24 torch; linear layers without an adapter: 1"


def test_layers_are_structured():
    layer = explain(model()).layers[1]
    assert (layer.name, layer.shape, layer.rank) == ("layers.0.down", (8, 12), 2)
    assert (layer.dtype, layer.device, layer.backend) == (torch.float32, torch.device("cpu"), "torch")
    assert explain(model()).frozen == ("lm_head",)


def test_a_model_without_adapters():
    assert str(explain(nn.Linear(2, 2))).endswith("adapted layers: none; linear layers without an adapter: 1")


def test_choices_of_the_user_are_told(monkeypatch):
    converted = model()
    first, second = converted["layers"]
    first["up"].merge()
    first["down"].backend, second["up"].backend = "reference", "triton"
    monkeypatch.setattr(validation, "triton_problem", lambda device, dtype: "there is no GPU")
    assert [(layer.backend, layer.reason) for layer in explain(converted).layers] == [
        ("none", "it is merged"),
        ("reference", "layer.backend says so"),
        ("triton", "layer.backend says so, but cannot run: there is no GPU"),
        ("torch", "it is the default on cpu"),
    ]


class OnCuda(nn.Module):
    """A stand-in for a weight on a GPU."""

    dtype, device, shape = torch.bfloat16, torch.device("cuda", 0), (8, 8)


def test_cuda_layers(cuda, monkeypatch):
    converted = model()
    for name, layer in converted.named_modules():
        if name.endswith(("up", "down")):
            del layer.weight
            layer.weight = OnCuda()
    assert reasons(explain(converted)) == {("triton", "it is the default on cuda")}
    for block in converted["layers"]:
        block["up"].r = block["down"].r = 513
    rank = "triton cannot run: it supports lora_A of rank up to 512, got rank 513"
    assert reasons(explain(converted)) == {("torch", rank)}
    monkeypatch.setattr(validation, "triton_problem", lambda device, dtype: "triton is not installed")
    assert reasons(explain(converted)) == {("torch", "triton cannot run: triton is not installed")}


# ---- the warning ----


def test_fallback_of_a_cuda_layer_warns_once_for_each_reason(cuda):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert validation.choose_backend(None, cuda, torch.bfloat16, 16) == "triton"
        assert validation.choose_backend("torch", cuda, torch.bfloat16, 600) == "torch"
        assert validation.choose_backend(None, torch.device("cpu"), torch.bfloat16, 600) == "torch"
    with pytest.warns(UserWarning, match='"torch" backend, .* rank up to 512, got rank 600.*explain'):
        assert validation.choose_backend(None, cuda, torch.bfloat16, 600) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert validation.choose_backend(None, cuda, torch.bfloat16, 600) == "torch"
    with pytest.warns(UserWarning, match="got rank 700"):
        validation.choose_backend(None, cuda, torch.bfloat16, 700)


def test_fallback_is_traced_without_a_graph_break_and_warns(monkeypatch):
    monkeypatch.setattr(validation, "_warned", set())
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x):
        return x + len(validation.choose_backend(None, torch.device("cuda"), torch.float64, 16))

    with pytest.warns(UserWarning, match="float32, bfloat16 and float16, got torch.float64"):
        assert traced(torch.zeros(())) == len("torch")


@pytest.mark.gpu
def test_cuda_layers_run_on_the_kernels():
    converted = model().to("cuda", torch.bfloat16)
    assert reasons(explain(converted)) == {("triton", "it is the default on cuda")}
    converted.double()
    assert {backend for backend, _ in reasons(explain(converted))} == {"torch"}


# ---- PEFT ----


def test_layers_of_peft():
    integration = pytest.importorskip("bora_kernels.integrations.peft", reason="the PEFT integration is needed")
    peft = pytest.importorskip("peft")
    base = nn.ModuleDict({"up": nn.Linear(8, 12), "embedding": nn.Embedding(5, 8), "head": nn.Linear(8, 5)})
    config = integration.BoraConfig(r=3, target_modules=["up", "embedding"])
    wrapped = peft.get_peft_model(base, config)
    explanation = explain(wrapped)
    assert [(layer.kind, layer.rank, layer.backend, layer.reason) for layer in explanation.layers] == [
        ("BoraLinear", 3, "torch", "it is the default on cpu"),
        ("BoraEmbedding", 3, "torch", "only linear layers have kernels"),
    ]
    assert explanation.frozen == ("base_model.model.head",)
    with wrapped.disable_adapter():
        assert reasons(explain(wrapped)) == {("none", "no adapter is active")}
    wrapped.merge_adapter()
    assert reasons(explain(wrapped)) == {("none", "it is merged")}


@kinds
def test_quantized_layers_of_peft(kind):
    """Told by the weight that they stand for, not by how it is packed."""
    integration = pytest.importorskip("bora_kernels.integrations.peft", reason="the PEFT integration is needed")
    peft = pytest.importorskip("peft")
    bf16 = torch.bfloat16
    options = {"compute_dtype": bf16} if kind in FOUR_BIT else {}
    base = nn.ModuleDict({"up": quantized_linear(kind, torch.randn(12, 32).to(bf16), **options)})
    if kind in FOUR_BIT:
        base["up"].quant_state.dtype = torch.float16
    wrapped = peft.get_peft_model(base, integration.BoraConfig(r=3, target_modules=["up"]))
    (layer,) = explain(wrapped).layers
    assert (layer.kind, layer.shape, layer.rank) == ("BoraQuantizedLinear", (12, 32), 3)
    assert (layer.dtype, layer.backend) == (torch.float16 if kind == "int8" else bf16, "torch")
    wrapped.merge_adapter()
    (merged,) = explain(wrapped).layers
    assert (merged.shape, merged.dtype, merged.reason) == (layer.shape, layer.dtype, "it is merged")
