"""Files of ONNX by PyTorch's exporter over torch.export, run by the evaluator that defines ONNX."""

import pytest
import torch
from torch import nn

from bora_kernels import convert, merge_adapter

pytest.importorskip("onnxscript", reason="the exporter needs onnxscript, of the extra integrations")
pytestmark = pytest.mark.sampled(4)
evaluator = pytest.importorskip("onnx.reference", reason="needs onnx, of the extra integrations")


class Model(nn.Module):
    """An embedding, a convolution, and linear layers, one of them with a short axis."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.conv = nn.Embedding(11, 24), nn.Conv1d(24, 20, 3, padding=1)
        self.up, self.down = nn.Linear(20, 28), nn.Linear(28, 3, bias=False)

    def forward(self, ids):
        return self.down(self.up(self.conv(self.tokens(ids).mT).mT).relu())


def through_peft(targets):
    peft = pytest.importorskip("peft")
    from bora_kernels.integrations.peft import BoraConfig

    return peft.get_peft_model(Model(), BoraConfig(r=2, lora_alpha=4, target_modules=targets))


def trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def ids(batch):
    return torch.randint(11, (batch, 5), generator=torch.Generator().manual_seed(batch))


def export(model, file):
    if hasattr(model, "get_base_model"):  # the PeftModel around it takes any arguments
        model = model.get_base_model()
    torch.onnx.export(
        model, (ids(2),), file, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )


def exported(model, file):
    """Its file's results for another batch size than the one that it was traced with."""
    export(model, file)
    session = evaluator.ReferenceEvaluator(str(file))
    return torch.from_numpy(session.run(None, {session.input_names[0]: ids(3).numpy()})[0])


ADAPT = {
    "convert": lambda: convert(Model(), r=2, target_modules=["up"]),
    "convert-short-axis": lambda: convert(Model(), r=2, target_modules=["down"]),
    "convert-dora": lambda: convert(Model(), r=2, method="dora", target_modules=["up"]),
    "peft": lambda: through_peft(["up", "down"]),
}
adapt = pytest.mark.parametrize("adapt", ADAPT.values(), ids=ADAPT)


@adapt
def test_unmerged_linear_layers_are_refused_with_the_way_out(adapt, tmp_path):
    with pytest.raises(torch.onnx.OnnxExporterError, match="adapter merged first") as caught:
        export(trained(adapt()), tmp_path / "model.onnx")
    assert isinstance(caught.value.__cause__, ValueError) and not list(tmp_path.iterdir())


@adapt
def test_the_reference_is_exported_unmerged(adapt, tmp_path):
    model = trained(adapt())
    for layer in model.modules():
        if hasattr(layer, "adapter_dtype"):
            layer.backend = "reference"
    torch.testing.assert_close(exported(model, tmp_path / "model.onnx"), model(ids(3)))


@adapt
def test_merged_models_are_exported(adapt, tmp_path):
    model = trained(adapt())
    expected = model(ids(3))
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else merge_adapter(model)
    torch.testing.assert_close(exported(plain, tmp_path / "model.onnx"), expected, rtol=1e-4, atol=1e-5)


def test_embeddings_and_convolutions_are_exported_unmerged(tmp_path):
    """They are made of PyTorch's own operations."""
    model = trained(through_peft(["tokens", "conv"]))
    torch.testing.assert_close(exported(model, tmp_path / "model.onnx"), model(ids(3)))
