"""Changes of a model's layers: from the start, and in single steps of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .changes import Change, weight_change
from .layers import check_base_is_start, find_layers, view, weight_name


def from_start(model: nn.Module, start: Mapping[str, Tensor] | None = None) -> list[Change]:
    """The change of every layer from W0 to now.

    Args:
        model: adapted by ``convert`` or by PEFT (``BoraConfig``, or PEFT's own LoRA or DoRA), or fine-tuned in full.
        start: weights before training by name, such as ``{n: t.clone() for n, t in model.state_dict().items()}``. Full
            fine-tuning needs it. For adapted layers it takes the place of the base weight, which is W0 already.

    Returns:
        A ``Change`` for each adapted linear layer, with ``step`` None; in a model without adapters for each
        ``torch.nn.Linear`` whose weight is in ``start``. Layers have their names in the base model. Adapters of
        embeddings and convolutions are left out.

    Raises:
        ValueError: where there is no such layer; for a PEFT layer that is merged, has not exactly one active adapter,
            is of another kind, or whose base weight is not W0 (``init_lora_weights="pissa"`` and the like without
            ``start``).
        TypeError: for sharded weights.
    """
    kept: Mapping[str, Tensor] = start or {}
    changes = []
    for name, layer in find_layers(model, lambda name, _: weight_name(name) in kept).items():
        seen, before = view(layer, name), kept.get(weight_name(name))
        if before is None:
            check_base_is_start(model)
            before = seen.base()
        elif seen.transposed:
            before = before.T
        after = seen.weight(seen.parameters)
        changes.append(weight_change(before.to(after.device), after, name))
    return changes


class StepRecorder:
    """What single optimizer steps changed: ``StepRecorder(model, optimizer, every=50)`` before training.

    The steps number ``every``, 2·``every`` and so on are recorded in ``changes``, a ``Change`` for each layer. Kept
    over such a step are copies of the adapters (in full fine-tuning of the trained weights); W' is made layer by layer
    after it. In the other steps a counter counts, and nothing is computed or kept.

    Args:
        model: as in ``from_start``; without adapters it is the linear layers whose weights are trained.
        optimizer: the one that is stepped.
        every: how many steps from one record to the next, at least 1.

    ``close()`` ends the recording. Raises ValueError and TypeError as ``from_start`` does.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int = 50) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        self.every = every
        self.changes: list[Change] = []
        self._layers = find_layers(model, _is_trained)
        for name, layer in self._layers.items():
            view(layer, name)  # refuses now what it would refuse at the first record
        self._step = 0
        self._before: dict[str, dict[str, Tensor]] | None = None  # what was trained, before a step that is recorded
        self._hooks = [optimizer.register_step_pre_hook(self._pre), optimizer.register_step_post_hook(self._post)]

    def close(self) -> None:
        """Remove the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def _pre(self, *_) -> None:
        self._step += 1
        if self._step % self.every == 0:
            self._before = {
                name: {kind: tensor.detach().clone() for kind, tensor in view(layer, name).parameters.items()}
                for name, layer in self._layers.items()
            }

    def _post(self, *_) -> None:
        if self._before is None:
            return
        for name, layer in self._layers.items():
            seen = view(layer, name)
            before, after = seen.weight(self._before.pop(name)), seen.weight(seen.parameters)
            self.changes.append(weight_change(before, after, name, self._step))
        self._before = None


def _is_trained(name: str, linear: Any) -> bool:
    return linear.weight.requires_grad
