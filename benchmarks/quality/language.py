"""SmolLM2 (Llama's architecture) as a function of token ids and adapted layers, for many runs at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .methods import Layers, Method, Parameters

PREFIX = "smollm2/"


class LanguageModel:
    """Tokens to hidden states; ``embedding`` turns these into logits over the corpus's tokens.

    ``arrays`` holds "smollm2/<name>": 4-bit blocks (Q4_1) of linear layers and 8-bit ones (Q8_0) of the embedding as
    the source has them, or float arrays; and "smollm2/config": attention heads, of them key-value heads, layers, eps
    and the base of the rotary angles.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> None:
        heads, kv_heads, layers, self.eps, self.theta = arrays[f"{PREFIX}config"].tolist()
        self.heads, self.kv_heads, self.layers = int(heads), int(kv_heads), int(layers)
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}  # norms
        for key in arrays:
            name = key.removeprefix(PREFIX)
            if name == key or name == "config":
                continue
            raw = arrays[key]
            tensor = torch.as_tensor(raw if raw.dtype != np.uint8 else dequantize(raw, 34 if name == "embed" else 20))
            kind = self.weights if tensor.dim() == 2 and name != "embed" else self.tensors
            kind[name] = tensor.float().to(device)
        self.weights = dict(sorted(self.weights.items()))  # whatever the files' order: a layer's place seeds its A
        missing = [i for i in range(self.layers) if f"layers.{i}.mlp.down_proj" not in self.weights]
        if missing or "embed" not in self.tensors:
            raise ValueError(f"the data must hold all parts of SmolLM2, got none of the layers {missing}")
        self.embedding = self.tensors.pop("embed")
        self.queries = [name for name in self.weights if name.endswith("q_proj")]

    def extra_parameters(self, method: Method, runs: int) -> Parameters:
        """The norms' weights, which full fine-tuning trains as well, [R, 1, H]."""
        if not method.full:
            return {}
        return {f"{name}.weight": tensor.expand(runs, 1, -1).clone() for name, tensor in self.tensors.items()}

    def __call__(self, layers: Layers, ids: Tensor) -> Tensor:
        """ids [R, B, L] -> hidden states [R, B, L, H] before the output embedding."""
        R, B, L = ids.shape
        x = F.embedding(ids, self.embedding).view(R, B * L, -1)
        head_dim = x.shape[-1] // self.heads
        frequencies = self.theta ** (-torch.arange(0, head_dim, 2, device=ids.device) / head_dim)
        angles = torch.arange(L, device=ids.device)[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)
        arguments = (layers, (R * B, L, head_dim), angles.cos(), angles.sin())
        for i in range(self.layers):
            scales = self._scales(i, layers)
            if torch.is_grad_enabled():  # activations of one layer at a time: 24 runs fit a device
                inputs = (self._layer, i, x, scales, *arguments)
                x = checkpoint(*inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._layer(i, x, scales, *arguments)
        return self._norm(x, "norm", layers).view(R, B, L, -1)

    def _scales(self, i: int, layers: Layers) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Scales of one layer's parts: small, and made outside what is computed twice."""
        names = [f"layers.{i}.self_attn.{part}_proj" for part in "qkvo"]
        names += [f"layers.{i}.mlp.{part}_proj" for part in ("gate", "up", "down")]
        return {name: layers.scales(name) for name in names}

    def _layer(
        self,
        i: int,
        x: Tensor,
        scales: dict[str, tuple[Tensor | None, Tensor | None]],
        layers: Layers,
        shape: tuple[int, int, int],
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        base, (sequences, L, head_dim) = f"layers.{i}.", shape

        def linear(part: str, x: Tensor) -> Tensor:
            return layers(base + part, x, scales[base + part])

        def rotated(z: Tensor) -> Tensor:
            first, second = z.chunk(2, -1)
            return z * cos + torch.cat([-second, first], -1) * sin

        h = self._norm(x, f"{base}input_layernorm", layers)
        query, key, value = (
            linear(f"self_attn.{part}_proj", h).view(sequences, L, -1, head_dim).transpose(1, 2) for part in "qkv"
        )
        query, key = rotated(query), rotated(key)
        key, value = (z.repeat_interleave(self.heads // self.kv_heads, dim=1) for z in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(x.shape)
        x = x + linear("self_attn.o_proj", attended)
        h = self._norm(x, f"{base}post_attention_layernorm", layers)
        gated = F.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h)
        return x + linear("mlp.down_proj", gated)

    def _norm(self, x: Tensor, name: str, layers: Layers) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * layers.parameters.get(f"{name}.weight", self.tensors[name])


def dequantize(raw: np.ndarray, block: int) -> np.ndarray:
    """Rows of GGUF's blocks of 32 weights: Q4_1 (20 bytes: scale, minimum, nibbles) or Q8_0 (34 bytes: scale, int8)."""
    blocks = raw.reshape(len(raw), -1, block)
    if block == 34:
        scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        return (scale * blocks[..., 2:].copy().view(np.int8)).reshape(len(raw), -1)
    scale, minimum = (blocks[..., i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    return (scale * nibbles + minimum).reshape(len(raw), -1)
