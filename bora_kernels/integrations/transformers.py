"""A callback for transformers' ``Trainer``: norms once for all micro-batches of an optimizer step."""

from __future__ import annotations

from contextlib import ExitStack

from transformers import TrainerCallback

from ..ops.reuse import reuse_scales


class ReuseScalesCallback(TrainerCallback):
    """Opens ``bora_kernels.reuse_scales`` from the first micro-batch of a step to its optimizer step.

    It gains with ``gradient_accumulation_steps`` above 1: ``Trainer(..., callbacks=[ReuseScalesCallback()])``. Where
    training raises, the scope stays open until the next ``train()`` or as long as the callback lives.
    """

    def __init__(self) -> None:
        self._scope = ExitStack()

    def __del__(self) -> None:
        self._scope.close()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._scope.close()
        self._scope.enter_context(reuse_scales())

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._scope.close()

    on_train_begin = on_train_end = on_pre_optimizer_step
