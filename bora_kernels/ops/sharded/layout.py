"""How a layer lies on a mesh of devices: the placement of each tensor, and the messages between the shards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ... import _private
from ...contract import Adapter, Completion

BY_ROWS = {
    "weight": Shard(0),
    "lora_A": Replicate(),
    "lora_B": Shard(0),
    "magnitude_row": Shard(0),
    "magnitude_col": Replicate(),
    "bias": Shard(0),
}
BY_COLUMNS = {
    "weight": Shard(1),
    "lora_A": Shard(1),
    "lora_B": Replicate(),
    "magnitude_row": Replicate(),
    "magnitude_col": Shard(0),
    "bias": Replicate(),
}


class Layout(NamedTuple):
    """How the weight lies on its mesh, and how x and y do."""

    mesh: DeviceMesh
    group: dist.ProcessGroup
    by_rows: bool
    out_features: int
    x_placement: Placement
    x_shape: Sequence[int]  # of the whole x
    y_placement: Placement | None = None  # None: y stays as the product leaves it

    def all_reduce(self, tensor: Tensor, between: Callable[[], None] | None = None) -> Tensor:
        """The sum over the shards, in place where it can be; ``between`` runs while it is under way."""
        tensor = tensor.contiguous()
        if between is None:
            dist.all_reduce(tensor, group=self.group)
        else:
            work = dist.all_reduce(tensor, group=self.group, async_op=True)
            between()
            work.wait()
        return tensor

    def all_reduce_together(self, *tensors: Tensor | None, between: Callable[[], None]) -> list[Tensor | None]:
        """``all_reduce`` of those that there are, as one message."""
        present = [t for t in tensors if t is not None]
        if not present:
            between()
            return list(tensors)
        message = self.all_reduce(torch.cat([t.flatten() for t in present]), between)
        parts = iter(message.split([t.numel() for t in present]))
        return [None if t is None else next(parts).view_as(t) for t in tensors]

    def completion(self) -> Completion:
        return Completion(col=self.all_reduce) if self.by_rows else Completion(row=self.all_reduce)

    def offset(self, shape: torch.Size) -> tuple[int, int]:
        """The row and the column of a weight of that shape where this rank's shard starts."""
        start, _ = shard_bounds(shape[0 if self.by_rows else 1], self.mesh)
        return (start, 0) if self.by_rows else (0, start)

    def gather(self, x: Tensor) -> Tensor:
        """Start to bring x from its own placement to where the product takes it."""
        return self._start(x, self.x_placement, self._inner, self.x_shape)

    def scatter(self, dx: Tensor) -> Tensor | _UnderWay:
        """Start to bring dx, a partial sum for a weight sharded by rows, to the placement of x. It is overwritten."""
        if self.by_rows and self.dx_placement.is_replicate():  # the usual case, at a third of the host time
            return _UnderWay(dx, dist.all_reduce(dx, group=self.group, async_op=True))
        return self._start(dx, Partial() if self.by_rows else self._inner, self.dx_placement, self.x_shape)

    def send(self, y: Tensor, kept: bool) -> Tensor:
        """y in its placement, from how the product leaves it. It is overwritten unless it is ``kept`` for backward."""
        if self.y_placement is None or self.y_placement == self.product_placement:
            return y
        if not self.by_rows and self.y_placement.is_replicate():  # as in ``scatter``
            return self.all_reduce(y.clone() if kept else y)
        shape = (*y.shape[:-1], self.out_features)
        return finish(self._start(y, self.product_placement, self.y_placement, shape))

    def receive(self, dy: Tensor) -> Tensor:
        """The gradient of what the product leaves, from that of what ``send`` made of it."""
        dy = finish(dy)
        source, target = _of_gradient(self.y_placement or self.product_placement), _of_gradient(self.product_placement)
        if source == target:
            return dy
        return finish(self._start(dy.contiguous(), source, target, (*self.x_shape[:-1], self.out_features)))

    @property
    def dx_placement(self) -> Placement:
        return _of_gradient(self.x_placement)

    @property
    def product_placement(self) -> Placement:
        """How the product leaves y."""
        return Shard(len(self.x_shape) - 1) if self.by_rows else Partial()

    @property
    def _inner(self) -> Placement:
        return Replicate() if self.by_rows else Shard(len(self.x_shape) - 1)

    def _start(self, tensor: Tensor, source: Placement, target: Placement, shape: Sequence[int]) -> Tensor:
        if source == target:
            return tensor
        whole = as_dtensor(tensor, self.mesh, source, shape)
        return whole.redistribute(placements=[target], async_op=True).to_local()


def positive(placement: Placement, dims: int) -> Placement:
    """The placement of a tensor of so many dimensions, without a negative one."""
    return Shard(placement.dim + dims) if isinstance(placement, Shard) and placement.dim < 0 else placement


def _of_gradient(placement: Placement) -> Placement:
    return Replicate() if placement.is_partial() else placement


class _UnderWay(NamedTuple):
    """A tensor that a collective still works on."""

    tensor: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.tensor


def shard_bounds(size: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Where this rank's shard of a dimension of that size starts and ends; the last ranks may have less, or none."""
    step = -(-size // mesh.size())
    start = min(size, step * mesh.get_local_rank())
    return start, min(size, start + step)


def as_dtensor(tensor: Tensor, mesh: DeviceMesh, placement: Placement, shape: Sequence[int]) -> DTensor:
    """This rank's part of a contiguous tensor of that shape, which the ranks may divide unevenly; differentiable."""
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(tensor, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride)


def to_local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, with a gradient placed as the tensor is."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and tensor.requires_grad):  # a frozen one costs the host less
        return tensor.to_local(grad_placements=tensor.placements)


def to_local_together(*tensors: Any) -> list[Tensor | None]:
    """``to_local`` of those that there are, as one step of autograd: a step for each costs the host twice as much."""
    if torch.compiler.is_compiling():
        return [None if t is None else to_local(t) for t in tensors]
    recording = torch.is_grad_enabled()
    trained = [recording and t is not None and t.requires_grad for t in tensors]
    parts = iter(_LocalParts.apply(*itertools.compress(tensors, trained)) if any(trained) else ())
    return [
        next(parts) if through else None if t is None else _part(t) for t, through in zip(tensors, trained, strict=True)
    ]


def _part(tensor: Any) -> Tensor:
    """This rank's part, which autograd does not follow."""
    part = _private.of_dtensor(tensor, "_local_tensor")  # ``to_local`` adds a view of a parameter's
    if type(part) is Tensor:
        return part
    with torch.no_grad():
        return tensor.to_local()


class _LocalParts(torch.autograd.Function):
    """This rank's parts of DTensors. Their gradients are placed, and their parts laid out, as the tensors are."""

    @staticmethod
    def forward(ctx, *tensors: DTensor) -> tuple[Tensor, ...]:
        parts = tuple(map(_part, tensors))
        ctx.like = [(_Placed.of(t), part.stride()) for t, part in zip(tensors, parts, strict=True)]
        ctx.set_materialize_grads(False)
        return tuple(part.view_as(part) for part in parts)  # autograd writes on what is returned

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[DTensor | None, ...]:
        return tuple(
            None if gradient is None else _placed_like(gradient, *like)
            for gradient, like in zip(gradients, ctx.like, strict=True)
        )


class _Placed(NamedTuple):
    """How a DTensor lies on its mesh, where PyTorch keeps it elsewhere than in ``_spec``, which is private."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(t: DTensor) -> Any:
        spec = _private.of_dtensor(t, "_spec")
        return _Placed(t.device_mesh, t.placements, t.shape, t.stride()) if spec is None else spec


def _placed_like(part: Tensor, spec: Any, stride: tuple[int, ...]) -> DTensor:
    """A DTensor of this part, placed as the one with that ``_spec``, whose part has that stride."""
    if torch.is_grad_enabled():  # with create_graph
        return as_dtensor(part, spec.mesh, spec.placements[0], spec.shape)
    if part.stride() != stride:
        part = part.new_empty_strided(part.shape, stride).copy_(part)
    if type(spec) is _Placed:
        mesh, placements, shape, whole_stride = spec
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=whole_stride)
    # as FSDP2 does, with the parameter's own spec: what ``from_local`` adds are checks and a step of autograd
    return DTensor(part, spec, requires_grad=False)


def whole_shape(x: Tensor, placement: Placement, in_features: int, mesh: DeviceMesh) -> list[int]:
    """The shape of the tensor [..., in_features] that x is this rank's part of.

    Features may divide unevenly, other dimensions may not. Raises ValueError for a part of another size.
    """
    shape = list(x.shape)
    last = isinstance(placement, Shard) and placement.dim == x.ndim - 1
    start, end = shard_bounds(in_features, mesh) if last else (0, in_features)
    if x.ndim == 0 or shape[-1] != end - start:
        raise ValueError(f"x must be [..., {end - start}] for {placement} of {in_features} in_features, got {shape}")
    if isinstance(placement, Shard) and not last:
        shape[placement.dim] *= mesh.size()
    return [*shape[:-1], in_features]


def finish(tensor: Tensor | _UnderWay) -> Tensor:
    """Wait for what ``gather`` or ``scatter`` started."""
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def check_placements(weight: DTensor, adapter: Adapter, bias: Tensor | None = None, x: Tensor | None = None) -> bool:
    """Whether the weight is sharded by rows; raises unless all lies as ``BY_ROWS`` or ``BY_COLUMNS`` says."""
    parameters: dict[str, Tensor | None] = {"weight": weight, **adapter._asdict(), "bias": bias}
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if placements not in ((Shard(0),), (Shard(1),)):
        raise TypeError(
            "weight must be a plain dense tensor, got a DTensor (sharded), and not once, by Shard(0) (rows) or Shard(1)"
            f" (columns), but by {placements}"
        )
    by_rows = placements == (Shard(0),)
    for name, expected in (BY_ROWS if by_rows else BY_COLUMNS).items():
        tensor = parameters[name]
        if tensor is None:
            continue
        got = "a plain tensor"
        if isinstance(tensor, DTensor):
            if tensor.placements == (expected,) and tensor.device_mesh == mesh:
                continue
            got = f"{tensor.placements} on {tensor.device_mesh}"
        raise TypeError(
            f"weight must be a plain dense tensor, got a DTensor (sharded), and beside {placements[0]!r} on {mesh} "
            f"{name} must be {expected!r}, got {got}"
        )
    if x is not None and not isinstance(x, DTensor):
        raise TypeError(f"x must be a DTensor on the mesh of weight, got {type(x).__name__}")
    if x is not None and x.device_mesh != mesh:
        raise ValueError(f"x must be on the mesh of weight, {mesh}, got {x.device_mesh}")
    return by_rows
