"""Liger's kernels in a stack of transformers: RMSNorm, SwiGLU, and the rotation of queries and keys.

What Liger changes outside of the given model, where later models would find it, is put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def apply(root: Any) -> nn.Module:
    """Put the kernels of norms and MLPs into the modules of a stack; the rotation is for ``rotation``."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    with _unchanged("LlamaRMSNorm", "LlamaMLP"):
        apply_liger_kernel_to_llama(rope=False, fused_linear_cross_entropy=False, model=root.model)
    root.model.norm.in_place = False  # the gradient that reaches the last norm is the caller's, for every step
    return root


@contextlib.contextmanager
def rotation() -> Iterator[None]:
    """The rotation is a function of the file that models are made from: it is Liger's as long as this is open."""
    from liger_kernel.transformers import liger_rotary_pos_emb

    with _unchanged("apply_rotary_pos_emb") as file:
        file.apply_rotary_pos_emb = liger_rotary_pos_emb
        yield


@contextlib.contextmanager
def _unchanged(*names: str) -> Iterator[Any]:
    from transformers.models.llama import modeling_llama

    own = {name: getattr(modeling_llama, name) for name in names}
    try:
        yield modeling_llama
    finally:
        for name, value in own.items():
            setattr(modeling_llama, name, value)
