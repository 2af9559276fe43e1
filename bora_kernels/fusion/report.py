"""What is fused in a model and what is not, for ``explain``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .fuse import LEFT_OUT
from .install import installed


@dataclass(frozen=True)
class FusedPart:
    """One fused part. ``problem`` says why its next call would be the plain forward's, or is None."""

    name: str
    kind: str
    problem: str | None


def fused_parts(model: nn.Module) -> list[FusedPart]:
    """The parts of a model that ``fuse`` installed, as they are now."""
    parts = []
    for name, module in model.named_modules():
        forward = installed(module)
        if forward is not None:
            part = forward.func.part  # type: ignore[attr-defined]
            parts.append(FusedPart(name, part.kind, part.problem(*forward.args)))
    return parts


def left_out(model: nn.Module) -> dict[str, str]:
    """Modules that ``fuse`` looked at and left as they were, by name, with the reason."""
    return {
        f"{outer}.{name}" if outer else name: reason
        for outer, module in model.named_modules()
        for name, reason in module.__dict__.get(LEFT_OUT, {}).items()
    }
