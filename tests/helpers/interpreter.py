"""Which versions Triton's interpreter works with."""

from __future__ import annotations

import importlib.util
from importlib import metadata


def _release(package: str) -> tuple[int, ...]:
    return tuple(map(int, metadata.version(package).split(".")[:2]))


def interpreter_problem() -> str | None:
    """Why the interpreter of the Triton that is installed cannot run kernels here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton"
    if _release("triton") <= (3, 6) and _release("numpy") >= (2, 4):
        return "the interpreter of Triton 3.6 does not take NumPy 2.4 or newer"
    return None
