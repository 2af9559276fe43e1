"""The operators' namespace, which a process has once."""

from __future__ import annotations

import torch


def define(*schemas: str) -> torch.library.Library:
    """The library ``bora_kernels`` with these operators.

    Raises:
        ImportError: where they were defined before, by another import of the package or before a reload of it.
    """
    library = torch.library.Library("bora_kernels", "FRAGMENT")
    try:
        for schema in schemas:
            library.define(schema)
    except RuntimeError as error:
        raise ImportError(
            "bora_kernels must be imported once in a process, got a second import or a reload of its modules: PyTorch "
            "holds the operators of the first. Start Python (in a notebook: the kernel) anew."
        ) from error
    return library
