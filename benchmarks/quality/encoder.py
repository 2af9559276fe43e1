"""MiniLM (BERT's architecture) as a function of token ids and adapted layers, for many runs at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .methods import Layers, Method, Parameters

PREFIX = "minilm/"
_PARTS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip


class Encoder:
    """Texts to vectors: the mean of the last hidden states over a text's tokens.

    ``arrays`` holds "minilm/<tensor>" under the names of BERT's checkpoint and "minilm/config": attention heads,
    layers, and the layer norms' eps.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> None:
        heads, layers, self.eps = arrays[f"{PREFIX}config"].tolist()
        self.heads, self.layers = int(heads), int(layers)
        names = [name for name in arrays if name.startswith((f"{PREFIX}embeddings.", f"{PREFIX}encoder."))]
        tensors = {n.removeprefix(PREFIX): torch.as_tensor(arrays[n]).float().to(device) for n in names}
        linear = [f"encoder.layer.{i}.{part}" for i in range(self.layers) for part in _PARTS]
        self.weights = {name: tensors.pop(f"{name}.weight") for name in linear}
        self.biases = {name: tensors.pop(f"{name}.bias") for name in linear}
        self.tensors = tensors  # embeddings and layer norms
        self.hidden = tensors["embeddings.word_embeddings.weight"].shape[1]
        self.queries = [name for name in linear if name.endswith("query")]

    def extra_parameters(self, method: Method, runs: int) -> Parameters:
        """Biases and layer norms, which full fine-tuning trains as well, [R, 1, N]."""
        if not method.full:
            return {}
        found = {f"{name}.bias": bias for name, bias in self.biases.items()}
        found |= {name: t for name, t in self.tensors.items() if name.startswith("encoder.")}
        return {name: tensor.expand(runs, 1, -1).clone() for name, tensor in found.items()}

    def __call__(self, layers: Layers, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids [R, B, L], lengths [R, B] -> vectors [R, B, H]."""
        R, B, L = ids.shape
        mask = torch.arange(L, device=ids.device) < lengths[..., None]
        bias = torch.zeros(R * B, 1, 1, L, device=ids.device).masked_fill_(~mask.view(R * B, 1, 1, L), -1e9)
        bias = bias.expand(-1, self.heads, L, -1)
        x = F.embedding(ids, self.tensors["embeddings.word_embeddings.weight"])
        x = x + self.tensors["embeddings.position_embeddings.weight"][:L]
        x = (x + self.tensors["embeddings.token_type_embeddings.weight"][0]).view(R, B * L, self.hidden)
        x = self._norm(x, "embeddings.LayerNorm", layers)
        for i in range(self.layers):
            base = f"encoder.layer.{i}."
            query, key, value = (
                layers(base + part, x).view(R * B, L, self.heads, -1).transpose(1, 2) for part in _PARTS[:3]
            )
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            attended = attended.transpose(1, 2).reshape(R, B * L, self.hidden)
            x = self._norm(x + layers(base + _PARTS[3], attended), f"{base}attention.output.LayerNorm", layers)
            inner = F.gelu(layers(base + _PARTS[4], x))
            x = self._norm(x + layers(base + _PARTS[5], inner), f"{base}output.LayerNorm", layers)
        weights = mask.unsqueeze(-1).float()
        return (x.view(R, B, L, -1) * weights).sum(2) / weights.sum(2)

    def _norm(self, x: Tensor, name: str, layers: Layers) -> Tensor:
        weight, bias = (
            layers.parameters.get(f"{name}.{part}", self.tensors[f"{name}.{part}"]) for part in ("weight", "bias")
        )
        if weight.dim() == 1:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * weight + bias
