"""Kernels of other libraries that write over what they are given, without a word to PyTorch.

A layer keeps its output for its backward. A change in place that PyTorch knows of shows in the output's version
(``autograd.saved_tensors``); these do not:

- Liger's rotations write over queries and keys, views of what q and k gave as a rule. Of an output that is kept they
  get a copy, which takes the memory that any other rotation takes.
- Liger's SwiGLU and GeGLU write their gradients over what gate and up gave. Then the gradient that a layer gets lies
  where its output was, and the output is computed again.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = "liger_kernel"
_ROTATIONS = {"rope": "rope_forward", "qwen2vl_mrope": "qwen2vl_mrope_forward", "llama4_rope": "llama4_rope_forward"}


def protect() -> None:
    """Called where a layer keeps its output: from then on rotations leave it as it is."""
    if not torch.compiler.is_compiling() and _LIBRARY in sys.modules:
        _protect()


def is_overwritten(output: Tensor | None, dy: Tensor) -> bool:
    """Whether a gradient was written over the output that it belongs to."""
    if torch.compiler.is_compiling() or type(dy) is not Tensor or type(output) is not Tensor:
        return False
    if dy.data_ptr() != output.data_ptr() or dy.numel() == 0:
        return False
    _warn()
    return True


@functools.cache
def _protect() -> None:
    for name, function in _ROTATIONS.items():
        try:
            module = importlib.import_module(f"{_LIBRARY}.ops.{name}")
        except ImportError:  # another version of the library
            continue
        if (own := getattr(module, function, None)) is not None:
            setattr(module, function, functools.wraps(own)(functools.partial(_on_copies, own)))


def _on_copies(own: Callable, queries: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # the compiler follows what a kernel writes
        return own(queries, keys, *args, **kwargs)
    return own(*[t.clone() if _is_kept(t) else t for t in (queries, keys)], *args, **kwargs)


def _is_kept(t: Tensor) -> bool:
    output = t if t._base is None else t._base
    return getattr(output.grad_fn, "output_is_saved", False)


@functools.cache
def _warn() -> None:
    warnings.warn(
        "the output of an adapted layer was written over in the backward of what reads it, as Liger's SwiGLU and GeGLU"
        " do, and is computed again, in the time of a forward: bora_kernels.fuse(model) and Liger's kernels with"
        " swiglu=False (geglu=False) take less",
        stacklevel=3,
    )
