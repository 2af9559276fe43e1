"""Tiny random models for the tests with PEFT, and their twins in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
import transformers  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from bora_kernels.integrations.peft import BoraConfig, BoraLayer  # noqa: E402
from bora_kernels.reference import bora_linear_ref  # noqa: E402

VOCABULARY = 40
MODELS = ("llama", "gpt2", "bert")


def make_base(kind: str = "llama", seed: int = 0, **options) -> transformers.PreTrainedModel:
    """A causal (BERT: masked) language model of two layers; its weights depend on the seed alone."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, **options}
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, **sizes}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    if kind == "bert":
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **sizes)).eval()


class Layers(nn.Module):
    """One layer of every kind that has a BoRA layer, and a normalization, which has none."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 12, padding_idx=0)
        self.conv1d = nn.Conv1d(12, 8, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 4, 3, padding=1)
        self.conv3d = nn.Conv3d(1, 6, (1, 1, 3))
        self.transposed = Conv1D(10, 24)
        self.linear = nn.Linear(10, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, ids):  # [M, 6]
        x = self.conv1d(self.embedding(ids).mT).mT  # [M, 6, 8]
        x = self.conv2d(x[:, None])  # [M, 4, 6, 8]
        x = self.conv3d(x[:, None]).amax((2, 4))  # [M, 6, 6]
        return self.norm(self.linear(self.transposed(torch.cat([x.flatten(1)[:, :24]], 1))))


LAYERS = ["embedding", "conv1d", "conv2d", "conv3d", "transposed", "linear"]
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 0], [6, 7, 0, 8, 9, 10]])


def make_ids(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_peft(base: nn.Module, *, trained: bool = True, **options) -> PeftModel:
    """A BoRA model over ``base``, which it changes; ``trained`` moves every adapter parameter off its start."""
    model = get_peft_model(base, BoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}))
    return train_a_little(model) if trained else model


@torch.no_grad()
def train_a_little(model: nn.Module, adapter: str = "default", seed: int = 2) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}" not in name or "lora_" not in name:
            continue
        change = torch.randn(parameter.shape, generator=generator).to(parameter)
        if "magnitude" in name:
            parameter *= 1 + 0.1 * change
        else:
            parameter += 0.2 * change
    return model


def bora_layers(model: nn.Module) -> dict[str, BoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BoraLayer)}


class DenseBora(nn.Module):
    """The reference in the place of a linear layer, with parameters of its own."""

    def __init__(self, base: nn.Module, layer: BoraLayer, config: BoraConfig) -> None:
        super().__init__()
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        for name in ("lora_A", "lora_B", "lora_magnitude_vector_row", "lora_magnitude_vector_col"):
            modules = getattr(layer, name)
            value = modules["default"].weight.detach().clone() if "default" in modules else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.scaling, self.options = layer.scaling["default"], (config.norm_order, config.detach_norm)

    def forward(self, x: Tensor) -> Tensor:
        return bora_linear_ref(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector_row,
            self.lora_magnitude_vector_col,
            self.bias,
            scaling=self.scaling,
            norm_order=self.options[0],
            detach_norm=self.options[1],
        )


def dense_twin(base: nn.Module, model: PeftModel) -> nn.Module:
    """``base`` (as it was before ``model`` was made of it) with the reference for each adapted layer."""
    twin = copy.deepcopy(base).requires_grad_(False)
    for name, layer in bora_layers(model.get_base_model()).items():
        dense = DenseBora(twin.get_submodule(name), layer, model.active_peft_config)
        twin.set_submodule(name, dense)
    return twin


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters, by names that a PEFT model and its twin share."""
    return {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".weight", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
