"""Tiny random models of the kinds that people fine-tune, and both ways to adapt them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bora_kernels import convert  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402

VOCABULARY, WIDTH = 30, 12
HEADS = {"num_attention_heads": 3, "num_hidden_layers": 2}
MIXTURE = {"hidden_size": WIDTH, "num_key_value_heads": 3, "num_experts_per_tok": 2, **HEADS}


def adapt(model: nn.Module, way: str, targets="all-linear", **options) -> nn.Module:
    """The model with adapters of rank 2, by ``convert`` or through PEFT."""
    if way == "convert":
        return convert(model, r=2, alpha=4, target_modules=targets, **options)
    return peft.get_peft_model(model, BoraConfig(r=2, lora_alpha=4, target_modules=targets, **options))


ways = pytest.mark.parametrize("way", ["convert", "peft"])


def make(kind: str) -> nn.Module:
    """A model in evaluation mode whose weights depend on its kind alone."""
    torch.manual_seed(0)
    config, model = KINDS[kind]
    return model(config()).eval()


def loss_of(model: nn.Module, seed: int = 0, length: int = 5) -> torch.Tensor:
    """The language modelling loss of a few random tokens."""
    ids = torch.randint(1, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


def train(model: nn.Module, steps: int = 12, lr: float = 2e-2) -> list[float]:
    """Losses of a few steps on the same tokens."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Adapted layers by the names that they have in the base model, each once."""
    return {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "adapter_dtype")
    }


def _config(name: str, **sizes):
    return lambda: getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **sizes)


KINDS = {
    "mamba": (
        _config("Mamba", hidden_size=WIDTH, state_size=4, num_hidden_layers=2, time_step_rank=3),
        transformers.MambaForCausalLM,
    ),
    "mamba2": (
        _config("Mamba2", hidden_size=WIDTH, state_size=4, num_heads=4, head_dim=6, n_groups=1, num_hidden_layers=2),
        transformers.Mamba2ForCausalLM,
    ),
    "t5": (
        _config("T5", d_model=WIDTH, d_kv=4, d_ff=20, num_layers=2, num_heads=3, decoder_start_token_id=0),
        transformers.T5ForConditionalGeneration,
    ),
    "falcon": (
        _config("Falcon", hidden_size=WIDTH, **HEADS),
        transformers.FalconForCausalLM,
    ),
    "llama": (
        _config("Llama", hidden_size=WIDTH, intermediate_size=20, **HEADS),
        transformers.LlamaForCausalLM,
    ),
    "mixtral": (
        _config("Mixtral", intermediate_size=20, num_local_experts=4, **MIXTURE),
        transformers.MixtralForCausalLM,
    ),
    "qwen3_moe": (
        _config(
            "Qwen3Moe",
            intermediate_size=20,
            moe_intermediate_size=8,
            num_experts=5,
            head_dim=4,
            mlp_only_layers=[1],
            **MIXTURE,
        ),  # fmt: skip
        transformers.Qwen3MoeForCausalLM,
    ),
}
