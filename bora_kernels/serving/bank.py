"""``AdapterBank``: the adapters of one layer, stacked, with their scales, to serve them in one batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import EPS, Backend, NormOrder, Slots, accumulation_dtype
from ..modules import FusedBoraLinear
from ..ops import validation
from .cancelled import Judge, wait_and_warn
from .entry import read
from .index import BatchIndex

BASE = "__base__"
"""The name of the base layer in a batch, as PEFT has it; None says the same."""
_MAX_RANK = 512


class AdapterBank:
    """Adapters over one weight, whose ranks, alphas, norm orders and members (BoRA, DoRA, columns, LoRA) may differ.

    An adapter's scales a = m_r / ‖·‖_row and g = m_c / ‖·‖_col are computed once, when it enters. It is copied: changes
    of the layer or the tensors that it came from have no effect until ``replace``.

    The memory of a slot is R·(N + K) elements in ``dtype`` and N + K in float32, where R is the largest rank so far.
    The number of slots doubles as adapters enter, up to ``max_adapters``; then ``add`` raises an error that names the
    adapter whose last use is longest ago, and it is the caller's to ``remove`` that one, or another. With ``max_rank``
    all memory is taken at once and stays where it is, as CUDA graphs need it.

    Changes are ordered like any write on the current CUDA stream.

    Args:
        weight: W0 [N, K], dense and frozen.
        max_adapters: how many there can be at a time.
        max_rank: the largest rank that can enter; None admits 512 and takes memory as adapters need it.
        dtype: of the factors; None takes weight's, whose rounding then is that of the update.
        backend: as in ``bora_linear_mixed``; None picks by device.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        weight: Tensor,
        max_adapters: int = 32,
        *,
        max_rank: int | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        validation.check_weight(weight)
        for name, value in (("max_adapters", max_adapters), ("max_rank", max_rank)):
            if (name == "max_adapters" or value is not None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if max_rank is not None and max_rank > _MAX_RANK:
            raise ValueError(f"max_rank must be at most {_MAX_RANK}, got {max_rank}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}")
        self.weight, self.max_adapters, self.backend = weight, max_adapters, backend
        self.max_rank = _MAX_RANK if max_rank is None else max_rank
        self._names: dict[str, int] = {}  # slots, in the order of last use
        self._lock = threading.RLock()
        self._dtype = weight.dtype if dtype is None else dtype
        self.slots = self._allocate(1, 1) if max_rank is None else self._allocate(1 + max_adapters, max_rank)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters; the one whose last use in an index is longest ago comes first."""
        return tuple(self._names)

    @property
    def nbytes(self) -> int:
        """Memory that the bank takes."""
        return sum(tensor.nbytes for tensor in self.slots)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def slot(self, name: str | None) -> int:
        """The number of an adapter's slot; that of the base layer, ``None`` or ``"__base__"``, is 0."""
        if name is None or name == BASE:
            return 0
        if name not in self._names:
            raise ValueError(f"name must be one of {sorted(self._names)} or {BASE!r}, got {name!r}")
        return self._names[name]

    # --- the adapters -------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        adapter: FusedBoraLinear | Sequence[Tensor | None] | None,
        *,
        scaling: float | None = None,
        norm_order: NormOrder = "row_col",
        eps: float = EPS,
        judge: Judge | None = wait_and_warn,
    ) -> None:
        """Let an adapter enter under a new name.

        Warns where it cancels most of a row or column of the weight: such lines are inexact in a batch of several
        adapters. To know that, this waits for the device, except while a CUDA graph is captured.

        Args:
            name: any but ``"__base__"``.
            adapter: a layer over this weight (``FusedBoraLinear`` and its kin), which says its options itself; or
                lora_A [R, K], lora_B [N, R], magnitude_row [N] or None, magnitude_col [K] or None; or None, for a name
                under which the layer is the base layer's.
            scaling, norm_order, eps: of tensors, as in ``bora_linear``.
            judge: what takes the name, the weight and the device's word of such lines, which is not 0 where there are
                some, in place of waiting and warning; None does not ask.

        Raises:
            ValueError, TypeError: for a name that is taken, a full bank, an adapter over another weight or of other
                shapes, a merged layer. The bank stays as it was.
        """
        with self._lock:
            if not isinstance(name, str) or name == BASE or name in self._names:
                raise ValueError(f"name must be a string that no adapter has, and not {BASE!r}, got {name!r}")
            if len(self._names) >= self.max_adapters:
                raise ValueError(
                    f"max_adapters must be more than {self.max_adapters} for another adapter, {name!r}: remove one "
                    f"first; {next(iter(self._names))!r} was used longest ago"
                )
            slot = min(set(range(1, len(self._names) + 2)) - set(self._names.values()))
            self._write(slot, read(name, adapter, self.weight, self.max_rank, scaling, norm_order, eps, judge))
            self._names[name] = slot

    def replace(
        self,
        name: str,
        adapter: FusedBoraLinear | Sequence[Tensor | None] | None,
        *,
        scaling: float | None = None,
        norm_order: NormOrder = "row_col",
        eps: float = EPS,
        judge: Judge | None = wait_and_warn,
    ) -> None:
        """Let an adapter take the place of the one of this name; arguments and errors are those of ``add``.

        An index that was made before stands for the new one.
        """
        with self._lock:
            slot = self._known(name)
            self._write(slot, read(name, adapter, self.weight, self.max_rank, scaling, norm_order, eps, judge))

    def remove(self, name: str) -> None:
        """Take an adapter out. An index that has it is refused from now on."""
        with self._lock:
            self._write(self._known(name), None)
            del self._names[name]

    def _known(self, name: str) -> int:
        if name not in self._names:
            raise ValueError(f"name must be one of {sorted(self._names)}, got {name!r}")
        return self._names[name]

    # --- batches ------------------------------------------------------------------------------------------------------

    def index(
        self,
        entries: Sequence[str | int | None],
        *,
        lengths: Sequence[int] | None = None,
        out: BatchIndex | None = None,
    ) -> BatchIndex:
        """What ``bora_linear_mixed`` needs to know of a batch: checked here, on the host, once for all layers.

        Banks of other layers take it too where they have these adapters in the same slots, as banks have that adapters
        entered and left in the same order (a name without an adapter for a layer enters as None).

        Args:
            entries: an adapter for each entry of the batch, by its name (None or ``"__base__"`` for the base layer) or
                by the number of its slot.
            lengths: tokens of each entry, where x has all of them in a row: the index then is one of tokens.
            out: an index to be overwritten, of as many entries, for a CUDA graph that was captured with it.

        Raises:
            ValueError, TypeError: for unknown names, numbers without an adapter, another number of lengths.
        """
        if isinstance(entries, (str, Tensor)) or not isinstance(entries, Sequence):
            raise TypeError(f"entries must be a list of names or of numbers of slots, got {type(entries).__name__}")
        with self._lock:
            by_slot = {slot: name for name, slot in self._names.items()}
            slots = [self._checked(entry, by_slot) for entry in entries]
            used = {by_slot[slot]: slot for slot in sorted(set(slots)) if slot}
            for name, slot in used.items():  # last used, so last in the order
                del self._names[name]
                self._names[name] = slot
        if lengths is not None:
            if len(lengths) != len(slots) or not all(isinstance(n, int) and n >= 0 for n in lengths):
                raise ValueError(f"lengths must be {len(slots)} numbers of tokens, got {list(lengths)}")
            slots = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
        if out is None:
            return BatchIndex(slots, used, self.slots.lora_A.device)
        if len(out) != len(slots) or out.tensor.device != self.slots.lora_A.device:
            raise ValueError(
                f"out must have {len(slots)} entries on {self.slots.lora_A.device}, got {len(out)} on "
                f"{out.tensor.device}"
            )
        out.update(slots, used)
        return out

    def _checked(self, entry: str | int | None, by_slot: dict[int, str]) -> int:
        if entry is None or isinstance(entry, str):
            if entry is not None and entry != BASE and entry not in self._names:
                raise ValueError(f"entries must be of {sorted(self._names)} or {BASE!r}, got {entry!r}")
            return self.slot(entry)
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise TypeError(f"entries must be names or numbers of slots, got a {type(entry).__name__}")
        if entry != 0 and entry not in by_slot:
            raise ValueError(f"entries must be 0, for the base layer, or of {sorted(by_slot)}, got {entry}")
        return entry

    def check_index(self, index: BatchIndex) -> None:
        """Raise ValueError for an index of adapters that this bank does not have where the index says."""
        for name, slot in index.used.items():
            if self._names.get(name) != slot:
                found = f"it in slot {self._names[name]}" if name in self._names else "none of that name"
                raise ValueError(
                    f"index must be one of this bank's adapters as they are now: it has {name!r} in slot {slot}, and "
                    f"the bank has {found}; make it anew with bank.index(...)"
                )

    # --- what is stored -----------------------------------------------------------------------------------------------

    def _allocate(self, slots: int, rank: int) -> Slots:
        (N, K), device = self.weight.shape, self.weight.device
        wide = accumulation_dtype(self.weight.dtype)
        return Slots(
            torch.zeros(slots, rank, K, dtype=self._dtype, device=device),
            torch.zeros(slots, rank, N, dtype=self._dtype, device=device),
            torch.ones(slots, N, dtype=wide, device=device),
            torch.ones(slots, K, dtype=wide, device=device),
        )

    @torch.no_grad()
    def _write(self, slot: int, entering: Slots | None) -> None:
        """Put an adapter into a slot, or the base layer."""
        rank = self.slots.lora_A.shape[1] if entering is None else entering.lora_A.shape[0]
        self._grow(slot + 1, rank)
        for stored, value, neutral in zip(self.slots, entering or (None,) * 4, (0, 0, 1, 1), strict=True):
            if value is None or stored.ndim == 3:
                stored[slot].fill_(neutral)
            if value is not None:
                (stored[slot, : len(value)] if stored.ndim == 3 else stored[slot]).copy_(value)

    def _grow(self, slots: int, rank: int) -> None:
        """Take larger memory where these slots or this rank do not fit."""
        old_slots, old_rank = self.slots.lora_A.shape[:2]
        if slots <= old_slots and rank <= old_rank:
            return
        if slots > old_slots:
            slots = min(1 + self.max_adapters, max(slots, 2 * old_slots))
        grown = self._allocate(max(slots, old_slots), max(rank, old_rank))
        for new, old in zip(grown, self.slots, strict=True):
            (new[:old_slots, :old_rank] if new.ndim == 3 else new[:old_slots]).copy_(old)
        self.slots = grown
