"""Warnings of adapters that cancel lines of their weight, of which the device has word (``Scales.cancelled``).

Who puts an adapter into a bank waits for that word. A model that runs does not: it asks once for each state of an
adapter, the word is copied to the host beside what follows, and a later call of such a model finds it there.
"""

from __future__ import annotations

import atexit
import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Judge = Callable[[str, Tensor, Tensor], None]
"""Takes an adapter's name, its weight and the word of its lines."""


class _Question(NamedTuple):
    """A word on its way to the host."""

    warning: str
    word: Tensor
    arrived: Any  # an event


_open: deque[_Question] = deque()  # as many as the device has still to answer
_asked: WeakKeyDictionary[Any, dict[str, tuple]] = WeakKeyDictionary()  # by layer and adapter: its state then


def wait_and_warn(name: str, weight: Tensor, word: Tensor) -> None:
    """A ``Judge`` for ``AdapterBank.add`` and ``replace``, whose caller the warning is for."""
    if not _is_capturing() and any(word.tolist()):
        warnings.warn(_warning(name, weight), stacklevel=5)  # above read, its no_grad, add


def ask_once(layer: Any, name: str, state: tuple) -> Judge | None:
    """A ``Judge`` for this state of a layer's adapter that does not wait; None where it was asked before."""
    asked = _asked.setdefault(layer, {})
    if asked.get(name) == state:
        return None

    def ask(name: str, weight: Tensor, word: Tensor) -> None:
        if _is_capturing():
            return
        if _is_far(word):
            _open.append(_Question(_warning(name, weight), *_send(word)))
        elif any(word.tolist()):
            warnings.warn(_warning(name, weight), stacklevel=2)
        asked[name] = state

    return ask


def forget_all_but(layer: Any, names: Collection[str]) -> None:
    """Forget what was asked of adapters that a layer no longer has."""
    asked = _asked.get(layer, {})
    for name in [name for name in asked if name not in names]:
        del asked[name]


def hear() -> None:
    """Warn of what has arrived since; waits for nothing."""
    while _open and not _is_capturing():
        try:
            question = _open.popleft()
        except IndexError:  # another thread has it
            return
        if not question.arrived.query():
            _open.appendleft(question)
            return
        if any(question.word.tolist()):
            warnings.warn(question.warning, stacklevel=2)


@atexit.register
def _hear_the_last() -> None:
    with contextlib.suppress(RuntimeError):  # of a device that failed
        hear()


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_far(word: Tensor) -> bool:
    return word.is_cuda


def _send(word: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, in pinned memory, and the event that it is there."""
    copy, arrived = word.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(word.device))
    return copy, arrived


def _warning(name: str, weight: Tensor) -> str:
    rounding = torch.finfo(weight.dtype).eps / 2
    return (
        f"adapter {name!r} leaves less than half of some rows or columns of a weight {list(weight.shape)}: where "
        f"a fraction f is left, a batch of several adapters computes it with an error of about {rounding:.0e} / f; "
        "where f is small, merge the adapter, or serve it alone, by its own layer, which is right there."
    )
