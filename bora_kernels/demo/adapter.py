"""Saving a trained BoRA classifier as a small file, loading and merging it, and comparing predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bora_kernels import FusedBoraLinear

from .data import Encoded
from .models import AdapterOptions, TextClassifier, build_classifier, trained_parameters
from .packages import DemoError
from .training import predict


@dataclass(frozen=True)
class Agreement:
    """How far two models agree on the same texts."""

    examples: int
    same_labels: int
    max_logit_difference: float


def save_adapter(classifier: TextClassifier, path: Path, options: AdapterOptions) -> None:
    """Write what was trained (``lora_A``, ``lora_B``, both magnitudes and the head) as safetensors."""
    tensors = {
        name: parameter.detach().cpu().contiguous() for name, parameter in trained_parameters(classifier).items()
    }
    metadata = {"rank": str(options.rank), "alpha": str(options.alpha), "norm_order": options.norm_order}
    save_file(tensors, path, metadata=metadata)


def load_adapter(
    path: Path, model: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextClassifier:
    """A fresh classifier on the pretrained ``model`` with the adapter of the file.

    Raises DemoError if the file does not hold exactly the tensors that this model's adapter has.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping: it has keys() only)
    options = AdapterOptions(int(metadata["rank"]), float(metadata["alpha"]), metadata["norm_order"])
    num_classes = tensors["head.bias"].numel()
    classifier = build_classifier(model, "bora", num_classes, options, device=device, dtype=dtype)
    parameters = trained_parameters(classifier)
    wrong = {n for n in parameters.keys() & tensors.keys() if parameters[n].shape != tensors[n].shape}
    wrong |= parameters.keys() ^ tensors.keys()
    if wrong:
        raise DemoError(f"{path} does not fit {model}: {', '.join(sorted(wrong)[:3])} and so on")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return classifier


def merge_adapter(classifier: nn.Module) -> None:
    """Merge every BoRA layer's update into its weight."""
    for module in classifier.modules():
        if isinstance(module, FusedBoraLinear):
            module.merge()


def compare(expected: torch.Tensor, classifier: nn.Module, data: Encoded) -> Agreement:
    """The classifier's predictions beside the logits [examples, classes] that are expected of it."""
    logits = predict(classifier, data)
    same = (logits.argmax(1) == expected.argmax(1)).sum().item()
    return Agreement(len(logits), int(same), (logits - expected).abs().max().item())
