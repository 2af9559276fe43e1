"""What replays read of Triton beyond its documented interface: a compiled kernel's parts, and its launch hooks."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from triton.runtime import driver as _driver

from .switch import Unsupported

try:
    from triton.knobs import runtime as _runtime

    _runtime.launch_enter_hook, _runtime.launch_exit_hook  # noqa: B018
except (ImportError, AttributeError):  # replays go on, and hooks that this Triton may have do not see them
    from types import SimpleNamespace

    _runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)


def hooked() -> bool:
    """Whether somebody, a profiler say, asked Triton to be called at every launch."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def compile_kernel(kernel: Any, grid: tuple[int, ...], tensors: tuple, arguments: dict) -> Any:
    """Compile what a launch needs on the current device: the kernel, which ``load`` takes, and its launcher.

    Threads may do this side by side.
    """
    compiled = kernel.warmup(*tensors, grid=grid, **arguments)
    # Up to Triton 3.6 a C compiler makes a launcher. This one is made for Triton's cache and not used itself: all are
    # modules of one name, and a file that Python loads once more takes the place of the last module of that name. If
    # another thread has just loaded that one, its kernel gets the wrong launcher.
    with contextlib.suppress(Exception):  # without it, or where Triton makes launchers elsewhere, ``load`` does it
        _driver.active.launcher_cls(compiled.src, compiled.metadata)
    return compiled


def load(compiled: Any) -> None:
    """Make a launcher, and put the kernel into the device's memory: one at a time, and while no thread compiles."""
    getattr(compiled, "run", None)  # both are done when it is first looked at


def unspecialized(kernel: Any) -> frozenset[str]:
    """Names of sizes for whose values, 1 and multiples of 16, a kernel is not compiled anew."""
    options = getattr(kernel, "kwargs", None) or {}  # the interpreter's kernels keep what they were made with
    return frozenset(getattr(kernel, "do_not_specialize", None) or options.get("do_not_specialize") or ())


def share_cache(kernel: Any, device: int) -> None:
    """Make Triton's table of a kernel's variants, which several threads would each make their own of."""
    caches = getattr(kernel, "device_caches", None)
    if caches is not None:
        caches[device]  # noqa: B018 # made when it is first looked at


class Kernel(NamedTuple):
    """A compiled kernel, as the driver takes it."""

    compiled: Any  # kept alive: it owns the function
    function: int
    threads: int  # of a block
    shared: int  # bytes of shared memory
    dependent: bool  # may start before the kernel before has ended: programmatic dependent launch
    names: tuple[str, ...]  # of all arguments
    kinds: dict[str, str]  # of those that are parameters, in order
    maps: tuple[dict, ...]  # of each tensor descriptor among them: block_size and swizzle


def kernel_of(compiled: Any) -> Kernel:
    """The parts of what a launch returned; Unsupported where they are not as expected."""
    if compiled is None:
        raise Unsupported("Triton's interpreter runs the kernels (TRITON_INTERPRET=1)")
    try:
        metadata, source = compiled.metadata, compiled.src
        special = metadata.num_ctas != 1 or metadata.launch_cooperative_grid
        scratch = metadata.global_scratch_size or metadata.profile_scratch_size
        kinds = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
        kernel = Kernel(
            compiled, compiled.function, 32 * metadata.num_warps, metadata.shared, bool(metadata.launch_pdl),
            tuple(source.fn.arg_names), kinds, tuple(getattr(metadata, "tensordesc_meta", None) or ()),
        )  # fmt: skip
    except (AttributeError, TypeError) as error:
        raise Unsupported(f"this version of Triton keeps a kernel's parts elsewhere ({error})") from error
    if special or scratch:
        raise Unsupported("Triton launches a kernel in clusters, cooperatively or with scratch memory")
    return kernel
