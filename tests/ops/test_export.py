"""Layers in graphs that leave the process: torch.export with gradients, torch.jit.trace, ONNX; a second import."""

import io
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.cases import backends, require
from torch import nn

from bora_kernels import FusedBoraLinear, FusedColumnLinear, FusedDoraLinear, convert, merge_adapter

pytestmark = pytest.mark.sampled(4)


class Model(nn.Module):
    """Two layers with something between them, so that a layer's input has a gradient."""

    def __init__(self, backend, device, cls=FusedBoraLinear, **options):
        super().__init__()
        self.first = cls(12, 20, r=2, device=device, **options)
        self.second = cls(20, 12, r=3, device=device, **options)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.lora_B)
            layer.backend = backend

    def forward(self, x):
        return self.second(self.first(x).relu()) + x


def results(module, x):
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    y = module(x)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    return y.detach(), dict(zip(["x", *trained], torch.autograd.grad(y, [x, *trained.values()], dy), strict=True))


KINDS = {
    "bora": (FusedBoraLinear, {}),
    "bora-col_row-nobias": (FusedBoraLinear, {"norm_order": "col_row", "bias": False}),
    "bora-detached": (FusedBoraLinear, {"detach_norm": True}),
    "dora-bf16": (FusedDoraLinear, {"dtype": torch.bfloat16}),
    "columns": (FusedColumnLinear, {}),
}


@backends
@pytest.mark.parametrize("kind, strict", [*((kind, False) for kind in KINDS), ("bora", True)])
def test_exported_layers_have_gradients(backend, strict, kind, device):
    cls, options = KINDS[kind]
    require(backend, options.get("dtype", torch.float32))
    model = Model(backend, device, cls, **options)
    example = torch.randn(2, 3, 12, device=device).to(options.get("dtype", torch.float32))
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.bora_kernels.forward.default) == 2
    x = torch.randn(5, 3, 12, device=device).to(example.dtype)
    y, gradients = results(model, x)
    for exported in (program, program.run_decompositions()):
        actual, held = results(exported.module(), x)
        assert torch.equal(actual, y) and held.keys() == gradients.keys()
        assert all(torch.equal(held[name], gradients[name]) for name in gradients)


@backends
def test_an_exported_layer_can_be_written_and_read(backend, device):
    require(backend, torch.float32)
    model, x, file = Model(backend, device), torch.randn(4, 12, device=device), io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    actual, held = results(torch.export.load(file).module(), x)
    y, gradients = results(model, x)
    assert torch.equal(actual, y) and all(torch.equal(held[name], gradients[name]) for name in gradients)


@backends
def test_a_graph_that_keeps_nothing_for_backward_says_so(backend, device):
    require(backend, torch.float32)
    model, x = Model(backend, device), torch.randn(4, 12, device=device)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x).detach(), model(x).detach())
    with pytest.raises(RuntimeError, match=r"must be traced under torch.enable_grad\(\) to have gradients"):
        exported(x).sum().backward()


@backends
def test_an_exported_layer_refuses_second_derivatives(backend, device):
    require(backend, torch.float32)
    x = torch.randn(4, 12, device=device, requires_grad=True)
    exported = torch.export.export(Model(backend, device), (x,)).module()
    (dx,) = torch.autograd.grad(exported(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative: backend="reference" has'):
        dx.square().sum().backward()


# ---- torch.jit.trace, ONNX ----

WAY_OUT = r'backend must be "reference" .*, or the adapter merged first \(layer.merge\(\), bora_kernels.merge_adapter'


@backends
def test_tracing_is_refused_with_the_way_out(backend, device):
    require(backend, torch.float32)
    model, x = Model(backend, device), torch.randn(4, 12, device=device)
    with pytest.raises(ValueError, match=WAY_OUT):
        torch.jit.trace(model, (x,))
    with pytest.raises(ValueError, match=WAY_OUT):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("way", ["reference", "merge", "merge_adapter"])
def test_the_ways_out_of_tracing(way, device):
    model, x = Model("reference" if way == "reference" else None, device), torch.randn(4, 12, device=device)
    expected = model(x)
    if way == "merge":
        model.first.merge()
        model.second.merge()
    elif way == "merge_adapter":
        merge_adapter(model)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), expected)


def test_an_export_to_onnx_is_refused_with_the_way_out(device, monkeypatch):
    """As the exporter over torch.export runs it; with it where the library is there."""
    model, x = Model(None, device), torch.randn(4, 12, device=device)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ValueError, match=WAY_OUT):
        torch.export.export(model, (x,))
    monkeypatch.undo()
    pytest.importorskip("onnxscript", reason="the exporter needs onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        torch.onnx.export(model, (x,), dynamo=True)
    chain, error = [], caught.value
    while error is not None:
        chain, error = [*chain, str(error)], error.__cause__ or error.__context__
    assert any("or the adapter merged first" in message for message in chain)


# ---- a second import ----


def in_a_process(source):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("second", ["delete", "reload-operators", "reload-quantized"])
def test_a_second_import_says_what_to_do(second):
    code = {
        "delete": "kept = dict(sys.modules); [sys.modules.pop(n) for n in kept if n.startswith('bora_k')]\n"
        "import bora_kernels",
        "reload-operators": "importlib.reload(bora_kernels.ops.operators)",
        "reload-quantized": "importlib.reload(bora_kernels.quantized.weights)",
    }[second]
    result = in_a_process(f"import importlib, sys, bora_kernels\n{code}")
    assert result.returncode == 1
    assert "ImportError: bora_kernels must be imported once in a process, got a second import or a" in result.stderr


def test_the_package_itself_may_be_reloaded():
    assert in_a_process("import importlib, bora_kernels; importlib.reload(bora_kernels)").returncode == 0


def test_importing_the_package_does_not_import_triton():
    """Nor the module of PyTorch's counters of operations, which would."""
    result = in_a_process("import sys, bora_kernels; sys.exit('triton' in sys.modules)")
    assert result.returncode == 0, result.stderr


def test_a_converted_model_exports(device):
    """Of another shape and with dropout, in evaluation."""
    model = convert(nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 5, bias=False)).to(device), r=2, dropout=0.2)
    x = torch.randn(3, 2, 7, device=device)
    exported = torch.export.export(model.eval(), (x,)).module()
    y, gradients = results(model, x)
    actual, held = results(exported, x)
    assert torch.equal(actual, y) and all(torch.equal(held[name], gradients[name]) for name in gradients)
