"""Spare Triton's interpreter what it does over and over: more than half of the time of the kernels' tests.

* For each launch, and for each call of a ``@triton.jit`` function within one, it looks through all that
  ``triton.language`` has for what to put other functions in the place of, though within a launch all of it is replaced
  already: a module is looked through once, and its functions are replaced once a launch.
* It makes a table of dtypes anew whenever it asks for one, and a type and a shape for each value: they are made once.
* Each sum and product of integers is made again in 64 bits and compared with what 32 bits hold, and then nothing is
  done with the answer, for which it would have to be in debug mode: that is left out.

``activate()`` changes no result.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect


def activate() -> None:
    """Patch the interpreter of this process; without what is patched, as in another version of Triton, do nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    names = ("_patch_lang", "_patch_builtin", "_patch_attr", "_get_np_dtype", "_LangPatchScope", "GridExecutor")
    if not all(hasattr(interpreter, name) for name in names) or hasattr(interpreter, "is_fast"):
        return
    _look_through_modules_once(interpreter, tl)
    _make_types_once(interpreter, tl)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.is_fast = True


def _look_through_modules_once(interpreter, tl) -> None:
    plain_patch_lang, plain_launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
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

    class Replacements(list):
        def set_attr(self, owner, name, value):
            self.append((name, value))

    @functools.cache
    def replacements(owner, builder):
        made = Replacements()
        for name, member in inspect.getmembers(owner):
            if tl.core.is_builtin(member):
                interpreter._patch_attr(owner, name, member, builder, made)
        return made

    def patch_builtin(owner, builder, scope):
        for name, value in replacements(owner, builder):
            scope.set_attr(owner, name, value)

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang, interpreter._patch_builtin = patch_lang, patch_builtin


def _make_types_once(interpreter, tl) -> None:
    plain_np_dtype, np_dtypes = interpreter._get_np_dtype, {}
    plain_block, blocks, shapes, scalars = tl.block_type.__init__, {}, {}, {}
    plain_tensor, plain_equal = tl.tensor.__init__, tl.dtype.__eq__
    Semantic = type(interpreter.interpreter_semantic)
    plain_broadcast = Semantic.broadcast_impl_value

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = plain_np_dtype(dtype)
        return np_dtypes[name]

    def block(self, element_ty, shape):
        sizes = tuple([getattr(size, "value", size) for size in shape])
        key = element_ty.name, getattr(element_ty, "address_space", None), sizes
        known = blocks.get(key)
        if known is None:
            plain_block(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            blocks[key] = self.__dict__
        else:
            self.__dict__ = known  # nothing changes a type

    def tensor(self, handle, type):
        keeper = scalars.setdefault(type.name, {}) if type.__class__ is tl.dtype else type.__dict__
        known = keeper.get("of_tensors")  # not kept by "bf16" and its like, which outlive the kernels
        if known is None:
            plain_tensor(self, handle, type)
            keeper["of_tensors"] = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = known

    def equal(self, other):
        return self is other or plain_equal(self, other)

    def broadcast(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return plain_broadcast(self, lhs, rhs)

    interpreter._get_np_dtype = get_np_dtype
    tl.block_type.__init__, tl.tensor.__init__, tl.dtype.__eq__ = block, tensor, equal
    Semantic.broadcast_impl_value = broadcast
