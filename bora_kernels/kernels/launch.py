"""Launches that skip Triton's per-call analysis of arguments, which costs more than most of these kernels run.

A launcher names everything but the tensors that decides a launch in a key. The first launch with a key goes through
Triton as usual; later ones call the compiled kernel. Triton specializes on dtypes and on the alignment of addresses,
so those are added to the key here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_launches: dict[tuple, tuple[Callable, tuple]] = {}
_MOST_LAUNCHES = 16384  # a layer adds 16 for each number of tokens that it meets; beyond this, start anew


def launch(kernel, key: tuple, tensors: tuple, prepare: Callable[[], tuple[tuple[int, ...], dict]]) -> None:
    """Launch ``kernel`` on ``tensors``: its leading arguments, each a Tensor, a tensor descriptor or None.

    ``prepare()`` returns the grid and the remaining arguments by name, in the kernel's order, and then the options;
    ``key`` must determine both, together with the kernel and the tensors' device, dtypes and alignments.
    """
    addresses, kinds, device = [], [], -1
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            address = tensor.data_ptr()
            addresses.append(address)
            kinds.append((tensor.dtype, address & 15))
            device = tensor.get_device()
        else:
            addresses.append(tensor)
            kinds.append(None)
    full_key = (kernel, key, device, *kinds)
    known = _launches.get(full_key)
    if known is not None:
        compiled, values = known
        compiled(*addresses, *values)
        return
    grid, arguments = prepare()
    compiled = kernel[grid](*tensors, **arguments)
    if compiled is not None:  # Triton's interpreter compiles nothing
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        values = tuple(arguments[name] for name in kernel.arg_names[len(tensors) :])
        _launches[full_key] = compiled[(*grid, 1, 1)[:3]], values
