"""A call's tensors and options, checked once for all calls that look alike, and what stands for them from then on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import Options, evaluation, given
from ..quantized import Layout, Quantized
from . import transforms, validation, watch
from .layouts import Layouts

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None), Quantized))


class Call(NamedTuple):
    """What a call computes with besides tensors, once its arguments were checked."""

    options: Options  # whose backend is chosen
    layout: Layout | None = None  # of a quantized weight
    prepared: Prepared | None = None  # None where nothing stands for the tensors: compiled, in a transform, on "meta"


class Prepared:
    """A call whose arguments were checked, and an identity for all that its kernels' plans depend on."""

    def __init__(self, call: Call, x: Tensor, stored: Sequence[Tensor], adapter: list[Tensor | None], bias) -> None:
        self.call = call._replace(prepared=self)
        self.on_triton = call.options.backend == "triton"
        vectors = (*adapter[2:], bias)
        self.joins = (  # whether the layer may be a part of a stage of several: all that it does is launches
            self.on_triton
            and call.layout is None
            and x.dtype != torch.float16
            and x.numel() > 0
            and call.options.dropout_p == 0.0
            and all(t is None or t.is_contiguous() for t in vectors)
        )
        names = ("x", "lora_A", "lora_B", "magnitude_row", "magnitude_col", *_LEFT_OVER, *["weight"] * len(stored))
        tensors = (x, *adapter, *[None] * len(_LEFT_OVER), *stored)
        # of what a backward gets again, the name and the shape (None where the forward makes it)
        self.saved = [(name, None if t is None else t.shape) for name, t in zip(names, tensors, strict=True)]
        self.backwards: list[Layouts] = []  # how dy and these lay in memory in backwards that were checked


Arguments = tuple[Tensor | Quantized, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
_prepared: dict[tuple, Prepared] = {}
_kinds: dict[tuple, Layouts] = {}
_kind_of_layer: dict[tuple, Layouts] = {}
_joined: dict[tuple, Joined] = {}
_MOST_PREPARED = 4096  # of some 2 KiB each
_MOST_BACKWARDS = 8
_LEFT_OVER = ("scales", "product", "u", "dropout")  # what a forward makes and leaves for its backward
_lock = threading.Lock()


def prepare(x: Tensor, tensors: Arguments, options: Options) -> tuple[Tensor, Call]:
    """Check the tensors (after x: weight, factors, magnitudes, bias) and options of a call, and choose its backend.

    Returns x as autocast makes it, and the call. In plain eager mode the answer is remembered: it depends on the
    options and on the tensors' kinds, shapes, strides, dtypes and devices, so the same object stands for these in what
    follows.
    """
    signature = None
    autocast = validation.autocast_dtype(x) if isinstance(x, Tensor) else None
    if transforms.plainly_eager() and type(x) in _PLAIN_TYPES:
        kind = _kind(tensors, autocast)
        if kind is not None:
            signature = (kind, options, *_layout(x))
            try:
                known = _prepared.get(signature)
            except TypeError:  # an option that is neither name nor number: the check tells which
                known = None
            if known is not None:
                return x if autocast is None else x.to(autocast), known.call
    validation.check_options(options)
    validation.check_tensors(x, *tensors)
    if not torch.compiler.is_compiling():
        watch.warn_of_narrow_magnitudes(*tensors[3:5])
    weight, *adapter, _ = tensors
    chosen = validation.choose_backend(options.backend, x.device, autocast or x.dtype, tensors[1].shape[0])
    shape = (tensors[2].shape[0], tensors[1].shape[1])
    layout, stored = weight if isinstance(weight, Quantized) else (None, (weight,))
    call = Call(options._replace(backend=evaluation(chosen, shape)), layout)
    x = x if autocast is None else x.to(autocast)
    if signature is None or weight.requires_grad:  # refused as soon as gradients are recorded
        return x, call
    if x.is_meta or any(isinstance(t, Tensor) and t.is_neg() for t in (x, *tensors)):  # the dispatcher's affair
        return x, call
    known = Prepared(call, x, stored, adapter, tensors[5])
    _remember(_prepared, signature, known)
    return x, known.call


def prepare_all(x: Tensor, layers: Sequence[tuple[Arguments, Options]]) -> list[Call]:
    """The calls of layers that read one x, which is as autocast makes it: as ``prepare`` gives them, in less time."""
    found: list[Call] = []
    plain = transforms.plainly_eager() and type(x) in _PLAIN_TYPES
    autocast, layout = validation.autocast_dtype(x), _layout(x) if plain else ()
    for tensors, options in layers:
        kind = _kind(tensors, autocast) if plain else None
        try:
            known = None if kind is None else _prepared.get((kind, options, *layout))
        except TypeError:  # as in ``prepare``
            known = None
        found.append(prepare(x, tensors, options)[1] if known is None else known.call)
    return found


def _kind(tensors: Arguments, autocast: torch.dtype | None) -> Layouts | None:
    """What stands for the tensors of a layer and all that are like them; None where a tensor is not a plain one.

    A layer is recognized by its lora_B, and its tensors in one look from C++.
    """
    weight, _, lora_B, magnitude_row, magnitude_col, bias = tensors
    layout, stored = weight if type(weight) is Quantized else (None, (weight,))
    every = (*stored, *tensors[1:])
    layer = (id(lora_B), autocast, layout, magnitude_row is None, magnitude_col is None, bias is None)
    kind = _kind_of_layer.get(layer)
    if kind is not None and kind.same(every):
        return kind
    if not _PLAIN_TYPES.issuperset(map(type, tensors)):
        return None
    signature = (autocast, *[None if t is None else _layout(t) for t in tensors])
    kind = _kinds.get(signature)
    if kind is None:
        kind = Layouts(every)
        _remember(_kinds, signature, kind)
    _remember(_kind_of_layer, layer, kind)
    return kind


def _remember(memory: dict, key: tuple, value: object) -> None:
    with _lock:
        if len(memory) >= _MOST_PREPARED and key not in memory:
            del memory[next(iter(memory))]  # the oldest, which is looked at again if it is met again
        memory[key] = value


class Joined:
    """Several calls as one: an identity for all that they depend on together, as ``Prepared`` is for one."""

    on_triton = True

    def __init__(self, members: tuple[Prepared, ...], others: Sequence[tuple[str, torch.Size | None]]) -> None:
        # of each what a ``Prepared`` has but x and dropout, after what they have in common
        self.saved = [*others, *[pair for each in members for pair in (*each.saved[1:8], *each.saved[9:])]]
        self.backwards: list[Layouts] = []
        self.recipes: dict[tuple, Any] = {}  # what follows from the calls, kept by whoever makes it


def may_join(calls: Sequence[Call | None]) -> bool:
    """Whether nothing of these calls stands in the way of one stage."""
    for call in calls:
        if call is None or call.prepared is None or not call.prepared.joins:
            return False
    return True


def join(calls: Sequence[Call | None], others: Callable[[], Sequence[tuple[str, torch.Size | None]]]) -> Joined | None:
    """What stands for these calls together, or None where they cannot be one stage.

    ``others()`` has the names and shapes of what their backward gets besides the layers' tensors.
    """
    if not may_join(calls):
        return None
    key = tuple([given(given(call).prepared) for call in calls])
    known = _joined.get(key)
    if known is None:
        known = Joined(key, others())
        _remember(_joined, key, known)
    return known


def prepare_backward(prepared: Prepared | Joined | None, dy: Tensor, saved: Sequence[Tensor | None]) -> object | None:
    """What stands for the tensors of a backward in its kernels' plans, or None where they are to be looked at there.

    They are dy and what was saved: x, factors, magnitudes, scales, product, u, dropout, and what the weight is stored
    as. Since forward their ``.data`` may have been given other memory, and hooks may have handed back other tensors.
    Raises ValueError that names the tensor if one is on another device now, or has another shape.
    """
    if prepared is None or type(dy) is not Tensor or torch.compiler.is_compiling() or dy.is_neg():
        return None
    if not prepared.on_triton:
        return prepared  # PyTorch's operations look for themselves
    tensors = (dy, *saved)
    for number, known in enumerate(prepared.backwards):
        if known.hold(tensors):
            return prepared, number
    for (name, shape), tensor in zip(prepared.saved, saved, strict=True):
        if tensor is None:
            continue
        if tensor.device != dy.device:
            raise ValueError(f"{name} must be on dy's device {dy.device} as in forward, got {tensor.device}")
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} as in forward, got {list(tensor.shape)}")
    with _lock:
        if len(prepared.backwards) == _MOST_BACKWARDS:
            return None
        prepared.backwards.append(Layouts(tensors))
        return prepared, len(prepared.backwards) - 1


def _layout(tensor: Tensor | Quantized) -> tuple:
    """What a tensor is, but for the values that it holds."""
    if type(tensor) is Quantized:
        return (tensor.layout, *map(_layout, tensor.tensors))
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_neg()
