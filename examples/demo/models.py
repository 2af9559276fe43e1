"""The classifier and the methods that fine-tune it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from bora_kernels import convert
from bora_kernels.contract import NormOrder

from .packages import InputError


class TextClassifier(nn.Module):
    """A linear head on the mean of an encoder's last hidden states."""

    def __init__(self, encoder: PreTrainedModel, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, classes] of token ids and their mask, both [batch, length]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).float()
        return self.head((hidden.float() * mask).sum(1) / mask.sum(1))


def model_source(name: str) -> str:
    """A folder or a hub id, as transformers takes it; InputError for a path that is no folder."""
    if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise InputError(f"--model must be a folder or a hub id, got {name}, which is no folder")
    return name


def build_classifier(
    model: str,
    method: str,
    num_classes: int,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    norm_order: NormOrder = "row_col",
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextClassifier:
    """A pretrained encoder prepared for one of ``examples.demo.METHODS``, with a new head.

    Every method starts as the pretrained encoder, and for one seed all have the same head and the same
    ``lora_A`` (uniform in ±1/√in_features, as in LoRA's own code). The frozen weights are of ``dtype``;
    what is trained is float32.
    """
    encoder = AutoModel.from_pretrained(model)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # its output is not used here, so it should be neither adapted nor counted
    encoder.to(torch.float32 if method == "full" else dtype).requires_grad_(method == "full")
    names = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise InputError(f"{model} must be built of torch.nn.Linear, but {type(encoder).__name__} has none")

    torch.manual_seed(seed)
    classifier = TextClassifier(encoder, num_classes)
    if method == "bora":
        convert(encoder, rank, alpha, target_modules=names, norm_order=norm_order)
    elif method in ("lora", "dora"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, use_dora=method == "dora")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from transformers, about a name that PEFT uses
            classifier.encoder = get_peft_model(encoder, config)
    torch.manual_seed(seed)
    for name, parameter in classifier.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    return classifier.to(device)


def trained_parameters(classifier: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name."""
    return {name: parameter for name, parameter in classifier.named_parameters() if parameter.requires_grad}
