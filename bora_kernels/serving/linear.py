"""``bora_linear_mixed``: the layer for a batch in which every entry has its own adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Backend
from ..ops import mixed, transforms, validation
from .bank import AdapterBank
from .entry import is_same
from .index import BatchIndex


def bora_linear_mixed(
    x: Tensor,
    weight: Tensor,
    bank: AdapterBank,
    index: BatchIndex,
    bias: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """A linear layer with an adapter for each entry of the batch, for inference.

        y_t = a_i⊙[ (x_t⊙g_i)·W0ᵀ + u_t·(s·B_i)ᵀ ] + bias        u_t = (x_t⊙g_i)·A_iᵀ        i = index[t]

    One read of W0 serves all adapters. Each has the scales a_i and g_i that it had when it entered the bank.

    Args:
        x: [..., K] in weight's dtype (any under ``torch.autocast``).
        weight: [N, K], the one that the bank was made for.
        bank: an ``AdapterBank``.
        index: of ``bank.index(...)``: an adapter for each x[t], or for each token x[..., :] where it has as many
            entries. No call waits for the device to check it.
        bias: [N] or None.
        backend: "triton", "torch", or None to pick by device.

    Returns:
        y: [..., N] in x's dtype (the autocast dtype under ``torch.autocast``), without a gradient.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; for an adapter of the index that
            has left the bank since, and where a gradient is wanted.
    """
    _check(x, weight, bank, index, bias)
    N, K = weight.shape
    autocast = validation.autocast_dtype(x)
    x = x if autocast is None else x.to(autocast)
    flat, entries = x.reshape(-1, K), len(index)
    whole = x.ndim == 1 or (entries != x.shape[0] and entries == flat.shape[0])
    if not whole and entries != x.shape[0]:
        raise ValueError(
            f"index must have an entry for each of the {x.shape[0]} entries of x {list(x.shape)}, or for each of its "
            f"{flat.shape[0]} tokens, got {entries}"
        )
    tokens = 1 if whole else flat.shape[0] // max(1, entries)
    chosen = validation.choose_backend(backend or bank.backend, x.device, x.dtype, 1)
    if chosen == "reference":
        raise ValueError('backend must be "triton", "torch" or None for a mixed batch, got "reference"')
    with torch.no_grad():
        y = mixed.mixed_linear(flat, weight, bias, index.tensor, bank.slots, tokens, chosen)
    return y.view(*x.shape[:-1], N)


def _check(x: object, weight: Tensor, bank: object, index: object, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError; looks at nothing that is on the device."""
    if not isinstance(bank, AdapterBank):
        raise TypeError(f"bank must be an AdapterBank, got {type(bank).__name__}")
    if not isinstance(index, BatchIndex):
        raise TypeError(f"index must be what bank.index(names) makes, got {type(index).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if not is_same(weight, bank.weight):
        raise ValueError(
            f"weight must be the one that the bank was made for, {list(bank.weight.shape)}, got another "
            f"{list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__}"
        )
    N, K = weight.shape
    if x.is_nested or x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x must be [..., {K}] for weight [{N}, {K}], got {'a nested' if x.is_nested else list(x.shape)}"
        )
    if x.dtype != weight.dtype and validation.autocast_dtype(x) is None:
        raise TypeError(f"x must have weight's dtype {weight.dtype} (or run under torch.autocast), got {x.dtype}")
    if bias is not None and (not isinstance(bias, Tensor) or tuple(bias.shape) != (N,)):
        raise ValueError(
            f"bias must be [{N}], got {list(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__}"
        )
    for name, tensor in (("weight", bank.slots.lora_A), ("index", index.tensor), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require a gradient, got one that does: a mixed batch is for inference; call it in "
                "torch.no_grad(), or train one adapter at a time with bora_linear"
            )
    transforms.refuse("a mixed batch", "the batch must have one adapter", x, weight, bias)
    bank.check_index(index)
