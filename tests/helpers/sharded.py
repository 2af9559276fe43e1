"""Layers over sharded weights for tests, beside the same layers whole."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module

from bora_kernels import FusedBoraLinear, bora_linear
from bora_kernels.distributed import BoraColwiseParallel, BoraRowwiseParallel
from bora_kernels.ops.sharded.layout import BY_COLUMNS, BY_ROWS

PLACEMENTS = {"rows": BY_ROWS, "columns": BY_COLUMNS}
STYLES = {
    "colwise": BoraColwiseParallel(output_layouts=Replicate()),
    "rowwise": BoraRowwiseParallel(input_layouts=Replicate()),
}  # whole tensors in and out
styles = pytest.mark.parametrize("style", STYLES)


def sharded_layer(mesh, placements, x, **arguments):
    """``bora_linear`` of whole tensors by way of their shards, differentiable."""

    def shard(tensor, placement):
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False).redistribute(placements=[placement])

    x = shard(x, Replicate())
    sharded = {name: shard(t, placements[name]) for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    return bora_linear(x, **(arguments | sharded)).redistribute(placements=[Replicate()]).to_local()


def whole_and_sharded(style, N=41, K=27, R=3, device="cpu", **options) -> tuple[FusedBoraLinear, FusedBoraLinear]:
    """The same float64 layer twice, once shared by all ranks."""
    layer = options.pop("layer", FusedBoraLinear)
    torch.manual_seed(3)
    whole = layer(K, N, R, dtype=torch.float64, adapter_dtype=torch.float64, device=device, **options)
    torch.nn.init.normal_(whole.lora_B)
    sharded = copy.deepcopy(whole)
    parallelize_module(sharded, init_device_mesh(device, (dist.get_world_size(),)), style)
    whole.backend = "reference"
    return whole, sharded


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        largest = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11 * largest, msg=name)


@functools.cache
def x_and_dy(N=41, K=27) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(4, 6, size, generator=generator, dtype=torch.float64) for size in (K, N))
