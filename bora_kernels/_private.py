"""The private parts of PyTorch that the package uses in eager mode, and what it does in a version that lacks one.

Each is looked up once, here; ``tests/test_private.py`` takes them away one by one. Where one is missing, results are
the same: what it saves is time. Those of replays are in ``replay/``, with what happens without them there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _find(path: str) -> Any:
    """A part of ``torch`` by its path, or None where this version has it not."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


# The hooks on saved tensors that are open here (None: none); without it there may always be some, of nobody known.
saved_tensors_hooks: Callable[[bool], tuple | None] = _find("_C._autograd._top_saved_tensors_default_hooks") or _always(
    (None, None)
)

# Whether a transform of torch.func surrounds the call; without it PyTorch refuses such calls by itself, and says less.
transforming: Callable[[], bool] = _find("_C._are_functorch_transforms_active") or _always(False)

# The backward that this thread runs (-1: none); without it checkpoints compute norms again.
backward_task: Callable[[], int] = _find("_C._current_graph_task_id") or _always(-1)

# Whether all modules have hooks; without it they may, and are called one by one after ``fuse``.
has_global_hooks: Callable[[], bool] = _find("nn.modules.module._has_any_global_hook") or _always(True)

_modes = _find("utils._python_dispatch._get_current_dispatch_mode_stack")
_in_a_mode = _find("utils._python_dispatch.is_in_torch_dispatch_mode")
_is_wrapper = _find("utils._python_dispatch.is_traceable_wrapper_subclass")


def modes() -> list[Any]:
    """The dispatch modes that are on, counters of operations for one; without it none is known."""
    return [] if _modes is None else _modes()


def is_watched() -> bool:
    """Whether a dispatch mode may be on; without a way to tell one always may, and calls go through the dispatcher."""
    if _modes is None or _in_a_mode is None:
        return True
    return _in_a_mode() and bool(_modes())  # the first takes no time, and is also true where none is on any more


def exporting() -> bool:
    """As ``torch.compiler.is_exporting``, which the compiler of older versions takes for True always."""
    # the compiler traces this, so it looks at each call
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


def is_wrapper(tensor: object) -> bool:
    """Whether a tensor is made of others, as sharded and quantized ones are (``__tensor_flatten__``)."""
    if _is_wrapper is not None:
        return _is_wrapper(tensor)
    return isinstance(tensor, Tensor) and type(tensor) is not Tensor and hasattr(type(tensor), "__tensor_flatten__")


def raw_saved_tensors(ctx: Any) -> Any:
    """Saved tensors that are still packed, each with ``unpack``; None without them. Raises for a freed graph."""
    try:
        raw = ctx._raw_saved_tensors
    except AttributeError:
        return None
    return raw if all(hasattr(each, "unpack") for each in raw) else None


def of_dtensor(tensor: Tensor, name: str) -> Any:
    """``_spec``, how a DTensor lies, or ``_local_tensor``, this rank's part; None where public ways have to do."""
    return getattr(tensor, name, None)


def tensor_of(module: nn.Module, name: str) -> Any:
    """A parameter, which some engines of sharding keep as a plain attribute, or a buffer.

    A module's attributes are slow to look up: seven of them take longer than the rest of a layer's way to its function.
    """
    kinds = module.__dict__
    tensors = kinds.get("_parameters", ())
    if name not in tensors:
        tensors = kinds.get("_buffers", ())
    return tensors[name] if name in tensors else getattr(module, name)
