"""Spare Triton's interpreter what it does over and over: a third of the time of the kernels' tests.

For each launch, and for each call of a ``@triton.jit`` function within one, it looks through all that
``triton.language`` has for what to put other functions in the place of, though within a launch all of it is replaced
already; and it makes a table of dtypes anew whenever it asks for one. ``activate()`` changes no result: a module is
looked through once, and its functions are replaced once a launch.
"""

from __future__ import annotations

import functools
import inspect


def activate() -> None:
    """Patch the interpreter of this process; without what is patched, as in another version of Triton, do nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    names = ("_patch_lang", "_patch_builtin", "_patch_attr", "_get_np_dtype", "_LangPatchScope")
    if not all(hasattr(interpreter, name) for name in (*names, "GridExecutor")) or hasattr(interpreter, "is_fast"):
        return
    plain_patch_lang, plain_launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    plain_np_dtype = interpreter._get_np_dtype
    replaced: set[frozenset[int]] | None = None  # the modules of triton.language, while a kernel runs

    def launch(self, *args, **options):
        nonlocal replaced
        replaced = set()
        try:
            return plain_launch(self, *args, **options)
        finally:
            replaced = None

    def patch_lang(fn):
        seen = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if replaced is not None and seen in replaced:
            return interpreter._LangPatchScope()
        scope = plain_patch_lang(fn)
        if replaced is not None:
            replaced.add(seen)
        return scope

    @functools.cache
    def builtins(owner):
        return [(name, member) for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]

    def patch_builtin(owner, builder, scope):
        for name, member in builtins(owner):
            interpreter._patch_attr(owner, name, member, builder, scope)

    np_dtypes = {}

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = plain_np_dtype(dtype)
        return np_dtypes[name]

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang, interpreter._patch_builtin = patch_lang, patch_builtin
    interpreter._get_np_dtype = get_np_dtype
    interpreter.is_fast = True
