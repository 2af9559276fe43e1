"""Compile Triton kernels for GPUs that this machine does not have, and read what they would use there.

    request = CompileRequest(my_kernel, {"x_ptr": "*bf16", "M": "i32"}, {"BLOCK_SIZE_M": 64}, arch=90)
    usage, *others = cross_compile_all([request, ...])

``signature`` gives the type of every argument that is not in ``constexprs``, as Triton spells it: "*bf16" (a
pointer), "i32", "i64", "fp32", "tensordesc<bf16[128, 64]>" (a tensor descriptor made on the host, with its
block shape). A real launch treats integer arguments equal to 1 as constexprs and knows which pointers and
integers are divisible by 16: do the same, the former in ``constexprs``, the latter in ``align16``.

Under TRITON_INTERPRET=1 no kernel of the process can be compiled, nor can the helpers that it calls. So a
subprocess without the interpreter imports the kernels anew from their modules and compiles them.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

Arch = int | str  # compute capability times ten, or the name of an AMD GPU

# Shared memory that one program can have, in bytes.
SHARED_MEMORY_LIMIT: dict[Arch, int] = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
    "gfx942": 65536,
}
ARCHS: tuple[Arch, ...] = tuple(SHARED_MEMORY_LIMIT)


_LOADS = r"\bld\.(?:[a-z_:0-9]+\.)*global|\bcp\.async\.(?:ca|cg|bulk)"
_STORES = r"\bst\.(?:[a-z_:0-9]+\.)*global|\b(?:red|atom)\.(?:[a-z_:0-9]+\.)*global"


class CompileError(RuntimeError):
    """A kernel that Triton, its backend or the assembler rejects; the message is theirs."""


@dataclass
class CompileRequest:
    kernel: Any  # a @triton.jit function at module level, whatever autotune or heuristics wrap it
    signature: dict[str, str]
    constexprs: dict[str, Any]
    arch: Arch
    align16: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, ...


def cross_compile(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    arch: Arch,
    align16: Sequence[str] = (),
    **options: Any,
) -> dict[str, int | None]:
    """Compile one kernel for ``arch``. Returns what a program needs there:

    * ``registers``: 32-bit registers of a thread (VGPRs on AMD);
    * ``stack_bytes``: local memory of a thread: spilled registers and, rarely, a few bytes of something else;
    * ``spill_bytes``: what a thread stores because it runs out of registers;
    * ``shared_bytes``: shared memory of a program (LDS on AMD);
    * ``early_loads``, ``early_stores``: instructions for global memory before the program waits for the launch before
      its own, of one that may begin while that runs (programmatic dependent launch); None where nothing waits.

    Raises CompileError. This starts a subprocess; for several kernels, ``cross_compile_all`` starts only one.
    """
    (result,) = cross_compile_all([CompileRequest(kernel, signature, constexprs, arch, align16, options)])
    if isinstance(result, CompileError):
        raise result
    return result


def some_of_each_kernel(requests: Sequence[CompileRequest]) -> list[CompileRequest]:
    """Variants of each kernel that have all of its tiles and, of each argument, all types and constants."""
    by_kernel: dict[str, list[tuple[CompileRequest, set]]] = {}
    for request in requests:
        arguments = request.signature | request.constexprs | request.options
        tile = [(name, v) for name, v in arguments.items() if name.startswith("BLOCK_SIZE") or name in request.options]
        values = {(name, repr(value)) for name, value in arguments.items()} | {("tile", repr(sorted(tile)))}
        by_kernel.setdefault(request.kernel.__name__, []).append((request, values))
    chosen = []
    for variants in by_kernel.values():
        missing = set().union(*(values for _, values in variants))
        while missing:
            request, values = max(variants, key=lambda variant: len(variant[1] & missing))
            chosen.append(request)
            missing -= values
    return chosen


def cross_compile_all(requests: Sequence[CompileRequest], jobs: int | None = None) -> list[dict | CompileError]:
    """``cross_compile`` of every request in one subprocess with ``jobs`` workers (default: one a core).

    The results are in the order of the requests; a CompileError takes the place of one that does not compile.
    """
    located = [(_locate(r.kernel), r.signature, r.constexprs, r.arch, r.align16, r.options) for r in requests]
    child = subprocess.run(
        [sys.executable, __file__],
        input=pickle.dumps((sys.path, jobs or os.cpu_count() or 1)) + pickle.dumps(located),
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
    )
    if child.returncode:
        raise RuntimeError(f"the compiling process failed:\n{child.stderr.decode(errors='replace')}")
    return [CompileError(result) if isinstance(result, str) else result for result in pickle.loads(child.stdout)]


def _locate(kernel: Any) -> tuple[str, str]:
    """The module and name under which another process finds ``kernel``."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    module, name = kernel.__module__, kernel.__qualname__
    if module == "__main__" or not name.isidentifier():
        raise ValueError(f"a kernel must be at the top of an importable module, got {module}.{name}")
    return module, name


def _compile(located: tuple) -> dict[str, int | None] | str:
    """In a worker: the resources of one kernel, or why it does not compile."""
    try:
        return _compile_here(*located)
    except Exception as error:  # every way in which a compiler can say no
        return f"{type(error).__name__}: {error}"


def _compile_here(location, signature, constexprs, arch, align16, options) -> dict[str, int | None]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = location
    kernel = getattr(importlib.import_module(module), name)
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn
    names = kernel.arg_names
    unknown = (signature.keys() | constexprs.keys() | set(align16)) - set(names)
    missing = set(names) - signature.keys() - constexprs.keys()
    if unknown or missing:
        raise ValueError(f"{name} has no arguments {sorted(unknown)}; not given: {sorted(missing)}")

    source = ASTSource(
        fn=kernel,
        signature={arg: "constexpr" if arg in constexprs else signature[arg] for arg in names},
        constexprs={(names.index(arg),): value for arg, value in constexprs.items()},
        attrs={(names.index(arg),): [["tt.divisibility", 16]] for arg in align16},
    )
    amd = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    usage = {"shared_bytes": compiled.metadata.shared}
    if amd:
        assembly = compiled.asm["amdgcn"]
        usage["registers"] = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        usage["stack_bytes"] = _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
        usage["spill_bytes"] = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        return usage
    ptx, waits, _ = compiled.asm["ptx"].partition("griddepcontrol.wait")
    usage["early_loads"] = len(re.findall(_LOADS, ptx)) if waits else None
    usage["early_stores"] = len(re.findall(_STORES, ptx)) if waits else None
    listing = _cuobjdump(compiled.asm["cubin"])
    usage["registers"] = _number(r"REG:(\d+)", listing)
    usage["stack_bytes"] = _number(r"STACK:(\d+)", listing)
    usage["spill_bytes"] = 0
    if usage["stack_bytes"]:  # only the assembler's log tells spills from the rest
        with (
            triton.knobs.compilation.scope(),
            triton.knobs.nvidia.scope(),
            redirect_stdout(io.StringIO()) as log,
        ):
            triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
            triton.compile(source, target=target, options=options)
        usage["spill_bytes"] = _number(r"(\d+) bytes spill stores", log.getvalue())
    return usage


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"no {pattern} in the compiler's output")
    return int(found[1])


def _cuobjdump(cubin: bytes) -> str:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _main() -> None:
    path, jobs = pickle.load(sys.stdin.buffer)
    sys.path[:] = path
    requests = pickle.load(sys.stdin.buffer)
    results_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the compilers print goes to stderr

    # Import before forking, so that the workers share torch and triton.
    for module in {request[0][0] for request in requests}:
        importlib.import_module(module)
    pool = functools.partial(ProcessPoolExecutor, mp_context=get_context("fork"))
    with pool(min(jobs, len(requests)) or 1) as workers:
        futures = [workers.submit(_compile, request) for request in requests]
        results = [_outcome(future) for future in futures]
    for i, request in enumerate(requests):  # a compiler that crashes takes the pool along: find out which one did
        if results[i] is None:
            with pool(1) as worker:
                results[i] = _outcome(worker.submit(_compile, request)) or "the compiler crashed"
    results_to.write(pickle.dumps(results))
    results_to.close()


def _outcome(future) -> dict[str, int | None] | str | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return None


if __name__ == "__main__":
    _main()
