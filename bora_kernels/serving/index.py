"""Which adapter each entry of a batch has: checked on the host once, read by the kernels of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BatchIndex:
    """Made by ``AdapterBank.index``. It stands for a batch in all banks that have its adapters in the same slots.

    Attributes:
        tensor: [4, entries] int32 on the bank's device: the entries in the order of their slots, the slot and the group
            of each, and the slot of each group, which are the entries of one adapter.
        used: the slots of the adapters in the batch, by their names.
    """

    def __init__(self, slots: Sequence[int], used: dict[str, int], device: torch.device) -> None:
        self.tensor = _grouped(slots).to(device, non_blocking=True)
        self.used = used

    def __len__(self) -> int:
        return self.tensor.shape[1]

    def update(self, slots: Sequence[int], used: dict[str, int]) -> None:
        """Stand for another batch of as many entries, in the memory that a CUDA graph was captured with."""
        self.tensor.copy_(_grouped(slots), non_blocking=True)
        self.used = used


def _grouped(slots: Sequence[int]) -> Tensor:
    order = sorted(range(len(slots)), key=slots.__getitem__)
    in_order = [slots[entry] for entry in order]
    distinct = sorted(set(slots))
    group = {slot: number for number, slot in enumerate(distinct)}
    padding = [0] * (len(slots) - len(distinct))
    return torch.tensor([order, in_order, [group[slot] for slot in in_order], distinct + padding], dtype=torch.int32)
