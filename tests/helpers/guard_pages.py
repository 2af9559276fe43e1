"""Tensors that end, or start, at a protected memory page, so that a kernel's out-of-bounds access is a fault.

Triton's interpreter reads and writes plain process memory, where an access just past a tensor usually goes
unnoticed. If the kernel's tensors are ``guarded``, that access kills the process with SIGSEGV (SIGBUS on
macOS). To survive it, run the check through ``run_isolated`` and ask ``faulted`` about the result.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0


def guarded(tensor: Tensor, at: str = "end") -> Tensor:
    """A detached CPU copy of ``tensor``, same shape and strides, whose memory touches a protected page.

    ``at="end"`` puts the guard right after the last element, ``at="start"`` right before the first. The other
    side has a guard too, less than a page away; the bytes between are NaN. The memory lives as long as the
    tensor.
    """
    if at not in ("start", "end"):
        raise ValueError(f"at must be 'start' or 'end', got {at!r}")
    source = tensor.detach().cpu()
    empty = source.numel() == 0
    span = 1 if empty else 1 + sum((n - 1) * step for n, step in zip(source.shape, source.stride(), strict=True))
    n_bytes = span * source.element_size()
    body = -(-n_bytes // _PAGE) * _PAGE

    memory = mmap.mmap(-1, body + 2 * _PAGE)
    memory[_PAGE : _PAGE + body] = b"\xff" * body
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _protect(address)
    _protect(address + _PAGE + body)

    offset = _PAGE + (body - n_bytes if at == "end" or empty else 0)
    flat = torch.frombuffer(memory, dtype=source.dtype, count=span, offset=offset)  # keeps ``memory`` alive
    if empty:  # its data pointer is the guard page itself
        return flat[1:].as_strided(source.shape, source.stride())
    flat.copy_(source.as_strided((span,), (1,)))
    return flat.as_strided(source.shape, source.stride())


def run_isolated(function: Callable[..., None], *args: Any, timeout: float = 300) -> subprocess.CompletedProcess:
    """Call ``function(*args)`` in a new process under Triton's interpreter, without a GPU, and wait for it.

    ``function`` must be at the top of an importable module. The return code is 0 if it returned, 1 if it
    raised.
    """
    request = pickle.dumps((sys.path, function.__module__, function.__qualname__, args))
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__],
        input=request,
        env=environment,
        capture_output=True,
        timeout=timeout,
    )


def faulted(result: subprocess.CompletedProcess) -> bool:
    """Whether the process died of a memory fault."""
    return -result.returncode in (signal.SIGSEGV, signal.SIGBUS)


def _protect(address: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, _PAGE, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect failed")


def _main() -> None:
    path, module, name, args = pickle.load(sys.stdin.buffer)
    sys.path[:] = path
    from helpers import fast_interpreter, interpreter_bf16

    fast_interpreter.activate()
    if interpreter_bf16.unsupported_reason() is None:
        interpreter_bf16.activate()
    getattr(importlib.import_module(module), name)(*args)


if __name__ == "__main__":
    _main()
