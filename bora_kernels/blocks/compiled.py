"""Blocks as operators that ``torch.compile`` does not look into: two for each kind of block, forward and backward.

Operation by operation a block's backward would make h and x̂ anew for an operator that reads them. The compiler sees
that the forward has made the same, does not make anew what an operator reads, and keeps both. Inside an operator they
are made anew as in eager mode, by the same code and kernels.

What an operator takes besides tensors is flat (``settings``); an absent result is an empty tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import quantized
from .._library import define
from ..contract import Adapter, Evaluation, Needs, NormOrder, Options, evaluation, separate_product
from ..ops import calls, operators, reuse, transforms, validation
from . import projection
from .projection import Kept, Part, Tensors

Outputs = Sequence[tuple[Tensor, Kept]]  # of each layer
Settings = tuple[list[int], list[float], str, list[bool], bool, str]
_SETTINGS = "int[] sizes, float[] numbers, str names, bool[] requested, bool needs_dx, str activation"


class Block(NamedTuple):
    """The operators of a kind of block."""

    library: torch.library.Library  # they live as long as it does
    forward: Callable[..., list[Tensor]]
    backward: Callable[..., list[Tensor]]


class Saved:
    """What a block's backward finds in its ctx, for one that runs in an operator."""

    output_is_saved, saved_outputs = False, ()  # the compiler follows what is changed in place

    def __init__(self, tensors: Sequence[Tensor | None], settings: Sequence[Any], norm: Sequence[float]) -> None:
        self.saved_tensors = tuple(tensors)
        self.parts, self.requested, self.needs_dx, self.activation = _read(settings)
        self.offset: float | None = None
        self.eps: float | None = None
        if norm:
            self.offset, self.eps = norm
        self.calls: list[calls.Call | None] = []
        self.needs: tuple[Needs, ...] = ()
        self.recipe: projection.Recipe | None = None

    def own(self) -> list[Tensors]:
        """The tensors of each layer."""
        return projection.split(self.parts, self.saved_tensors[-sum(part.size for part in self.parts) :])


def is_traced() -> bool:
    """Whether a block is to be its operator. An exported program has the operators of its layers."""
    return torch.compiler.is_compiling() and not transforms.exporting()


def define_block(
    name: str, forward: Callable[..., Outputs], backward: Callable[[Saved, Sequence[Tensor]], Sequence[Tensor | None]]
) -> Block:
    """Register the operators of a kind of block.

    ``forward(x, parts, tensors, requested, needs_dx, activation)`` gives what each layer does, and
    ``backward(saved, dys)`` dx and the gradients of all tensors.
    """
    library = define(
        f"{name}(Tensor x, Tensor?[] tensors, {_SETTINGS}) -> Tensor[]",
        f"{name}_backward(Tensor[] dys, Tensor?[] saved, {_SETTINGS}, float[] norm) -> Tensor[]",
    )

    def run(x: Tensor, tensors: list[Tensor | None], *settings: Any) -> list[Tensor]:
        parts, requested, needs_dx, activation = _read(settings)
        results: list[Tensor | None] = []
        with _as_traced(x, parts, projection.split(parts, tensors)):
            for y, kept in forward(x, parts, tuple(tensors), requested, needs_dx, activation):
                results += (y, None if kept.product is y else kept.product, kept.u, kept.scales)
        return _with_empty(results, x)

    def run_backward(dys: list[Tensor], saved: list[Tensor | None], *settings: Any) -> list[Tensor]:
        ctx = Saved(saved, settings[:-1], settings[-1])
        with _as_traced(dys[0], ctx.parts, ctx.own()):
            return _with_empty(backward(ctx, dys), dys[0])

    return Block(
        library,
        operators.register(library, name, run, _fake),
        operators.register(library, f"{name}_backward", run_backward, _backward_fake),
    )


# --- calls -----------------------------------------------------------------------------------------------------------


def forward(
    block: Block,
    x: Tensor,
    parts: tuple[Part, ...],
    tensors: Sequence[Tensor | None],
    requested: tuple[bool, ...],
    needs_dx: bool,
    activation: str = "",
) -> Outputs:
    """What each layer gives and leaves for backward. Raises as ``bora_linear`` does."""
    own, is_mlp = projection.split(parts, tensors), activation != ""
    needs = projection.needs(parts, requested, needs_dx, is_mlp)
    results = block.forward(x, list(tensors), *_settings(parts, requested, needs_dx, activation))
    outputs = []
    for number, (part, of, need) in enumerate(zip(parts, own, needs, strict=True)):
        y, product, u, scales = results[4 * number : 4 * number + 4]
        read = results[0] if is_mlp and number == 2 else x  # e has the shape of h
        (call,) = projection.prepare((part,), read, (of,))
        if call is None:
            outputs.append((y, Kept(None)))
            continue
        members = Adapter(*of[:4]).members
        needs_S = need.sums(members, need.norm_paths(members, call.options))[0] and call.options.backend != "dense"
        kept = product if separate_product(x.dtype, of[4]) else y
        outputs.append(
            (y, Kept(call, scales if any(members) else None, kept if needs_S else None, u if need.lora_B else None))
        )
    return outputs


def backward(block: Block, ctx: Any, dys: Sequence[Tensor], activation: str = "") -> tuple[Tensor | None, ...]:
    """dx and the gradients of the layers' tensors."""
    norm = [] if ctx.offset is None else [ctx.offset, ctx.eps]
    needs_dx = ctx.needs[0].x
    settings = _settings(ctx.parts, ctx.requested, needs_dx, activation)
    results = block.backward(list(dys), list(ctx.saved_tensors), *settings, norm)
    wanted = (needs_dx, *ctx.requested)
    return tuple(result if want else None for result, want in zip(results, wanted, strict=True))


# --- what is not a tensor --------------------------------------------------------------------------------------------


def _settings(parts: tuple[Part, ...], requested: Sequence[bool], needs_dx: bool, activation: str) -> Settings:
    numbers: list[float] = []
    names: list[str] = []
    for _, options, layout in parts:
        if options is not None:
            scaling, norm_order, detach_norm, _, eps, backend = options
            numbers += (scaling, eps)
            names.append(f"{norm_order} {int(detach_norm)} {backend or ''}")
        else:
            names.append("")
        if layout is not None:
            kind, (N, K), dtype, block_size = layout
            names.append(f"{kind} {N} {K} {_NAMES[dtype]} {' '.join([str(size) for size in block_size])}")
        else:
            names.append("")
    return [part.size for part in parts], numbers, "|".join(names), list(requested), needs_dx, activation


def _read(settings: Sequence[Any]) -> tuple[tuple[Part, ...], tuple[bool, ...], bool, str]:
    sizes, numbers, names, requested, needs_dx, activation = settings
    return _parts(tuple(sizes), tuple(numbers), names), tuple(requested), needs_dx, activation


@functools.lru_cache(maxsize=4096)
def _parts(sizes: tuple[int, ...], numbers: tuple[float, ...], names: str) -> tuple[Part, ...]:
    parts, texts, left = [], names.split("|"), iter(numbers)
    for size, options, layout in zip(sizes, texts[::2], texts[1::2], strict=True):
        parts.append(Part(size, _options(options, left) if options else None, _layout(layout) if layout else None))
    return tuple(parts)


def _options(text: str, numbers: Iterator[float]) -> Options:
    norm_order, detach_norm, backend = text.split(" ")
    scaling, eps = next(numbers), next(numbers)
    chosen = cast("Evaluation | None", backend or None)
    return Options(scaling, cast("NormOrder", norm_order), detach_norm == "1", 0.0, eps, chosen)


def _layout(text: str) -> quantized.Layout:
    kind, N, K, dtype, *block_size = text.split(" ")
    return quantized.Layout(kind, (int(N), int(K)), getattr(torch, dtype), tuple(map(int, block_size)))


_NAMES = {getattr(torch, name): name for name in ("float32", "bfloat16", "float16", "float64")}


@contextmanager
def _as_traced(x: Tensor, parts: tuple[Part, ...], own: Sequence[Tensors]) -> Iterator[None]:
    """Autocast where it was on as the block was traced, which x has its dtype from; each call computes its norms."""
    casts = any(part.layout is None and of[5].dtype != x.dtype for part, of in zip(parts, own, strict=True))
    with torch.no_grad(), reuse.nothing(), torch.autocast(x.device.type, x.dtype if casts else None, enabled=casts):
        yield


def _with_empty(results: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if result is None else result.contiguous() for result in results]


# --- shapes ----------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, tensors: list[Any], *settings: Any) -> list[Tensor]:
    parts, requested, needs_dx, activation = _read(settings)
    needs, lead = projection.needs(parts, requested, needs_dx, activation != ""), x.shape[:-1]
    results: list[Tensor] = []
    for part, of, need in zip(parts, projection.split(parts, tensors), needs, strict=True):
        N, K = shape = part.shape(of)
        weight = x.new_empty(shape) if part.layout is not None else of[5]
        made: list[Tensor | None] = [None] * 3
        if part.options is not None:
            adapter = Adapter(*of[:4])
            chosen = validation.choose_backend(part.options.backend, x.device, x.dtype, adapter.lora_A.shape[0])
            options = part.options._replace(backend=evaluation(chosen, shape))
            paths = need.norm_paths(adapter.members, options)
            rows, save = x.new_empty(math.prod(lead), K), need.sums(adapter.members, paths)[0]
            _, *made = operators.forward_fake(rows, weight, adapter, None, of[4], None, options, paths, save)
            made[1] = made[1] if need.lora_B else None
        results += [x.new_empty(*lead, N), *_with_empty(made, x)]
    return results


def _backward_fake(dys: list[Tensor], saved: list[Any], *settings: Any) -> list[Tensor]:
    ctx = Saved(saved, settings[:-1], settings[-1])
    own = ctx.own()
    dx = dys[0].new_empty(*dys[0].shape[:-1], ctx.parts[0].shape(own[0])[1]) if ctx.needs_dx else None
    wanted = zip([t for of in own for t in of], ctx.requested, strict=True)
    rest = [torch.empty(t.shape, dtype=t.dtype, device=t.device) if want else None for t, want in wanted]
    return _with_empty([dx, *rest], dys[0])
