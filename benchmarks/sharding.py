"""The stack of a provider distributed over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from bora_kernels import FusedBoraLinear
from bora_kernels.distributed import BoraColwiseParallel, BoraRowwiseParallel

from .adapting import install
from .cases import Case
from .models import Workload
from .providers import Provider
from .verify import Result

STRATEGIES = ("single", "fsdp", "tp")
ROWWISE = ("o_proj", "down_proj")  # what tensor parallelism shards over inputs; over outputs all else


class ShardedStep:
    """Forward and backward of an adapted stack under a strategy; gradients are new tensors of each step.

    ``case.mode`` names the strategy. The weights are copies: nothing is shared with the workload.
    """

    def __init__(self, workload: Workload, provider: Provider, case: Case, mesh: DeviceMesh) -> None:
        self.root = workload.copy(workload.root, share=False)
        adapters = install(provider.adapt, self.root, workload, case.rank, provider.adapter_dtype(case))
        workload.set_mode(self.root, training=True, checkpointing=False)
        names = {id(parameter): name for name, parameter in self.root.named_parameters()}
        kinds = {names[id(p)]: kind for adapter in adapters for kind, p in adapter.items()}
        shard(self.root, case.mode, mesh)
        parameters = dict(self.root.named_parameters())  # others than before, where they were sharded
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in kinds)  # as it was
        self.trained = [(kind, parameters[name]) for name, kind in kinds.items()]
        self.x, self.dy = workload.x.detach().requires_grad_(), workload.dy

    def __call__(self) -> Tensor:
        self.clear()
        y = self.root(self.x)
        y.backward(self.dy)
        return y

    def clear(self) -> None:
        """Free the gradients."""
        self.x.grad = None
        for _, parameter in self.trained:
            parameter.grad = None

    def result(self) -> Result:
        """What a step computes, with whole gradients."""
        result = {"y": [_whole(self().detach())], "dx": [_whole(self.x.grad)]}
        for kind, parameter in self.trained:
            result.setdefault(f"d_{kind}", []).append(_whole(parameter.grad))
        return result


def shard(root: nn.Module, strategy: str, mesh: DeviceMesh) -> None:
    """Distribute an adapted stack in place, as docs/distributed.md and docs/tensor_parallel.md do."""
    blocks: Any = getattr(root, "model", root).layers
    if strategy == "fsdp":
        for module in (*blocks, root):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    elif strategy == "tp":
        for block in blocks:
            styles: dict[str, ParallelStyle] = {}
            for name, module in block.named_modules():
                if name.endswith("_proj"):
                    styles |= tensor_parallel_styles(name, module)
            parallelize_module(block, mesh, styles)


def tensor_parallel_styles(name: str, layer: nn.Module) -> dict[str, ParallelStyle]:
    """The styles of an adapted linear layer, or those of the parts of a PEFT layer that have the sharded dimension.

    Of PEFT's factors the other one is replicated: what PyTorch's styles send makes its gradient whole.
    """
    rowwise = name.endswith(ROWWISE)
    if isinstance(layer, FusedBoraLinear):
        return {name: BoraRowwiseParallel() if rowwise else BoraColwiseParallel()}
    style = RowwiseParallel if rowwise else ColwiseParallel
    if isinstance(layer, nn.Linear):
        return {name: style()}
    if not hasattr(layer, "base_layer"):
        raise TypeError(f"no tensor parallel style for {type(layer).__name__}")
    factor = "lora_A" if rowwise else "lora_B"
    return {f"{name}.base_layer": style(), f"{name}.{factor}.default": style()}


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
