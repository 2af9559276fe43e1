"""Reuse of norms and scales while the parameters that they were computed from stay the same.

Norms depend on the weight and the adapter only, so a second micro-batch and the recomputation of a checkpointed forward
need not compute them again. Parameters are compared by storage and autograd version, which some changes (a write
through ``.data`` or numpy, some sharding engines) leave alone. So without being asked it is done only where autograd
relies on versions anyway: in the recomputation, during backward, of a non-reentrant checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .. import _private

T = TypeVar("T")
_Entry = tuple[tuple, bool, Tensor]  # what the scales were computed from, whether with products, the flat scales
_scopes: list[WeakIdKeyDictionary] = []  # lora_B -> _Entry, and what ``keep`` keeps, a dictionary for each open scope
_here = threading.local()  # ``nothing`` where nothing is reused in this thread
_checkpointed = WeakIdKeyDictionary()  # the same, from forwards that a backward is going to repeat


@contextmanager
def reuse_scales() -> Iterator[None]:
    """A scope in which norms are computed once for each state of a layer's parameters.

    Open it around the micro-batches between two optimizer steps, or around evaluation:

        with bora_kernels.reuse_scales():
            for micro_batch in micro_batches:
                model(micro_batch).backward()
        optimizer.step()

    A step of any ``torch.optim`` optimizer ends the reuse of what was there before, as does every change that
    autograd's version counters see. Other changes inside the scope (``parameter.data[...] = …``, numpy) are not seen.
    Compiled regions (``torch.compile``) compute norms in every call. Scopes may be nested; all threads share them.

    Scales are read as they were computed: on several CUDA streams, order the first call before the others; a CUDA graph
    that was captured in a scope may be replayed only in that scope, and does not see later changes.
    """
    scope = WeakIdKeyDictionary()
    _scopes.append(scope)
    hook = register_optimizer_step_post_hook(lambda *_: scope.clear())
    try:
        yield
    finally:
        hook.remove()
        _scopes[:] = [other for other in _scopes if other is not scope]  # by identity: == would compare tensors


def forget() -> None:
    """End the reuse of everything computed so far."""
    for entries in (*_scopes, _checkpointed):
        entries.clear()


@contextmanager
def nothing() -> Iterator[None]:
    """Where nothing is reused nor kept for later in this thread: in compiled regions, which own what is made there."""
    before, _here.nothing = getattr(_here, "nothing", False), True
    try:
        yield
    finally:
        _here.nothing = before


def may_find() -> bool:
    """Whether anything is reused now, or kept for later."""
    if torch.compiler.is_compiling() or getattr(_here, "nothing", False):
        return False
    return bool(_scopes) or _private.backward_task() != -1 or _in_checkpoint()


def find(
    lora_B: Tensor, state: Callable[[], tuple | None], products: bool
) -> tuple[Tensor | None, Callable[[Tensor], None] | None]:
    """Flat scales that the layer with this lora_B had before in the same ``state()``, and what to hand new ones to.

    Either is None where there is none; both where nothing is reused.
    """
    if not may_find():
        return None, None
    in_backward = _private.backward_task() != -1
    if _scopes:
        entries, look, remembers = _scopes[-1], True, True
    elif in_backward or _in_checkpoint():
        entries, look, remembers = _checkpointed, in_backward, not in_backward
    else:
        return None, None
    fingerprint = state()
    if fingerprint is None:
        return None, None
    entry: _Entry | None = entries.get(lora_B) if look else None
    if not remembers:
        entries.pop(lora_B, None)
    if entry is not None and entry[0] == fingerprint and (entry[1] or not products):
        if not entry[2].is_inference() or torch.is_inference_mode_enabled():  # autograd saves no inference tensor
            return entry[2], None
    return None, (lambda flat: entries.update({lora_B: (fingerprint, products, flat)})) if remembers else None


def keep(owner: Any, state: tuple | None, make: Callable[[], T]) -> T:
    """What ``make()`` makes, or in a scope what it made there before for this owner in the same state."""
    if not _scopes or state is None:
        return make()
    entries = _scopes[-1]
    entry = entries.get(owner)
    if entry is None or entry[0] != state:
        entry = entries[owner] = state, make()
    return entry[1]


def state_of(tensors: tuple[Tensor | None, ...], options: tuple) -> tuple | None:
    """What scales are computed from; None for tensors without a version."""
    if any(tensor is not None and tensor.is_inference() for tensor in tensors):
        return None
    return options, *(None if t is None else (t.data_ptr(), t._version, t.dtype, t.shape) for t in tensors)


def _in_checkpoint() -> bool:
    """Whether a non-reentrant checkpoint surrounds this forward: it packs what is saved for backward."""
    hooks = _private.saved_tensors_hooks(True)
    # a hook may be any callable, and not all have a module
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"
