"""Whether stages are replayed: the switch that users have, and what stands in the way of replays, said once."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_VARIABLE = "BORA_KERNELS_REPLAY"


class Unsupported(Exception):
    """Why a stage cannot be replayed. It runs as Python then."""


class Unavailable(Unsupported):
    """Why no stage can be replayed in this process."""


def _switched_off() -> bool:
    value = os.environ.get(_VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{_VARIABLE} must be 0 (launches are not replayed) or 1, got {value!r}")
    return value == "0"


_lock = threading.Lock()
_for_good = _switched_off() or torch.version.hip is not None  # a replay's parameters are those of CUDA kernels
_scopes = 0
off = _for_good  # what stages look at


@contextmanager
def replay_disabled() -> Iterator[None]:
    """A scope in which every kernel is launched through Triton, none from a recording.

    Results are the same and take more host time: some 16 calls of Triton for a layer's step. For a whole process set
    the environment variable ``BORA_KERNELS_REPLAY=0``, which is read when bora_kernels is imported.

        with bora_kernels.replay_disabled():
            model(x).sum().backward()

    It holds for all threads of the process, because autograd runs backward in threads of its own. Scopes may be nested
    and overlap; replays go on after the last of them, with the recordings of before.
    """
    _open(1)
    try:
        yield
    finally:
        _open(-1)


def _open(scopes: int) -> None:
    global _scopes, off
    with _lock:
        _scopes += scopes
        off = _for_good or _scopes > 0


def give_up(problem: Unavailable) -> None:
    """Replay nothing from here on, and say why."""
    global _for_good
    _for_good = True
    _open(0)
    warn_once(problem)


_warned: set[str] = set()


def warn_once(problem: object) -> None:
    """Warn that launches are not replayed because of ``problem``, once for each problem."""
    text = str(problem)
    if text not in _warned:
        _warned.add(text)
        warnings.warn(
            f"bora_kernels runs kernels as usual but cannot replay their launches, which takes more host time: {text}. "
            f"{_VARIABLE}=0 or bora_kernels.replay_disabled() turns replays off without this warning.",
            stacklevel=2,
        )
