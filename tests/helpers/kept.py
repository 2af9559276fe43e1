"""What a forward keeps for its backward, in eager mode and in what the compiler makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(call: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes that a call leaves for its backward, in memory that none of the known tensors lies in."""
    places = {t.untyped_storage().data_ptr() for t in known}
    storages: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in places:
            storages[storage.data_ptr()] = storage.nbytes(), tensor  # kept alive, so that no place is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for size, _ in storages.values())


def partitioned(call: Callable | nn.Module) -> Callable:
    """A call in a graph for forward and one for backward, parted as ``torch.compile`` does, without generated code."""
    torch._dynamo.reset()
    return torch.compile(call, backend="aot_eager_decomp_partition", fullgraph=True)
