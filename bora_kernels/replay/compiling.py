"""Kernels compiled side by side, before the first of them is launched.

Triton compiles a kernel when it is first launched: those of a step one after the other, in some 15 s. What a stage
launches depends on nothing but its key, so it is run once without launching, and what it would launch is compiled in
threads. They do not wait for each other: of a compilation only the first seventh, Triton's reading of the source, holds
Python's lock, while its passes, LLVM, the assembler and the C compiler for launchers do not. Then they are loaded, one
after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .compiled import compile_kernel, load, share_cache, unspecialized
from .recording import PlannedLaunch, planning

_known: set[tuple] = set()  # variants of kernels that were compiled here, or are being
_compiling = threading.Lock()  # held by a thread whose kernels are compiled and loaded


class Missing:
    """Of planned launches those whose kernels were not met before, one for each variant."""

    def __init__(self) -> None:
        self.launches: dict[tuple, PlannedLaunch] = {}

    def append(self, launch: PlannedLaunch) -> None:
        variant = _variant(launch)
        if variant not in _known and variant not in self.launches:
            self.launches[variant] = _without_memory(launch)

    def compile(self) -> int:
        """Compile them side by side, and load them; returns how many they are.

        Those of the longest source come first: nobody waits for the last of them alone.

        One that does not compile or load raises when it is launched, as it would have without this.
        """
        _known.update(self.launches)
        for variant, launch in self.launches.items():
            share_cache(launch.kernel, variant[0])
        with _compiling:
            with ThreadPoolExecutor(max(1, min(len(self.launches), _usable_cores()))) as pool:
                longest = sorted(self.launches.items(), key=lambda item: -len(getattr(item[1].kernel, "src", "")))
                compilations = {pool.submit(_compile, *item): item[0][0] for item in longest}
            for compilation, device in compilations.items():
                with contextlib.suppress(Exception), torch.cuda.device(device):
                    load(compilation.result())
        return len(self.launches)


def compile_stage(
    function: Callable[..., tuple], tensors: tuple, options: dict, then: Callable[..., None] | None = None
) -> None:
    """Compile and load what a stage launches on these tensors and was not met before, and what ``then`` does after it.

    ``then`` takes the results, the tensors and the options.
    """
    if torch.cuda.is_current_stream_capturing():
        return  # a capture forbids other threads what loading a kernel may need
    missing = Missing()
    try:
        with planning(missing):
            results = function(*tensors, **options)
            if then is not None and missing.launches:
                with contextlib.suppress(Exception):  # an error of it comes again when it runs
                    then(results, *tensors, **options)
        del results
        if missing.launches:
            missing.compile()
    except Exception:  # noqa: S110 # an error of the stage, or of a kernel, comes again when it runs
        pass


def _compile(variant: tuple, launch: PlannedLaunch) -> Any:
    with torch.cuda.device(variant[0]):
        return compile_kernel(*launch)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _variant(launch: PlannedLaunch) -> tuple:
    """What Triton compiles a kernel anew for: a device, kinds of its tensors and sizes, values of its constexprs."""
    passed, plain = _passed(launch.kernel), unspecialized(launch.kernel)
    return (
        torch.cuda.current_device(),
        launch.kernel,
        *map(_kind_of_tensor, launch.tensors),
        *[
            (name, _kind_of_size(value, name in plain) if name in passed else value)
            for name, value in launch.arguments.items()
        ],
    )


@functools.cache
def _passed(kernel: Any) -> frozenset[str]:
    """Names of arguments that a compiled kernel takes: those that are not constexprs."""
    code = kernel.fn.__code__
    return frozenset(code.co_varnames[: code.co_argcount]) - kernel.fn.__annotations__.keys()


def _kind_of_size(value: float, plain: bool) -> object:
    if isinstance(value, float):
        return float
    narrow = -(2**31) <= value < 2**31
    return narrow if plain else (value == 1, value % 16 == 0, narrow)


def _kind_of_tensor(tensor: Any) -> object:
    if tensor is None:
        return None
    if isinstance(tensor, Tensor):
        return tensor.dtype, tensor.data_ptr() % 16 == 0
    return tensor.base.dtype, tuple(tensor.block_shape)


@functools.cache
def _stand_in(dtype: torch.dtype, device: torch.device, aligned: bool) -> Tensor:
    """A few elements that start at a multiple of 16 bytes, or do not."""
    return torch.zeros(17, dtype=dtype, device=device)[0 if aligned else 1 :]


def _without_memory(launch: PlannedLaunch) -> PlannedLaunch:
    """The same launch for the compiler, on tensors of a few elements: those that it was planned with may go."""

    def stand_in(tensor: Any) -> Any:
        if tensor is None:
            return None
        if isinstance(tensor, Tensor):
            return _stand_in(tensor.dtype, tensor.device, tensor.data_ptr() % 16 == 0)
        return dataclasses.replace(tensor, base=_stand_in(tensor.base.dtype, tensor.base.device, True))

    return launch._replace(tensors=tuple(map(stand_in, launch.tensors)))
