"""Parallel styles for ``parallelize_module`` that shard a BoRA, DoRA or LoRA layer as PyTorch's shard a linear one.

    from torch.distributed.tensor.parallel import parallelize_module
    parallelize_module(model, mesh["tp"], {"mlp.up": BoraColwiseParallel(), "mlp.down": BoraRowwiseParallel()})

The names are PyTorch's: "colwise" splits the columns of Wᵀ, which are the output features and rows of W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..modules import FusedBoraLinear
from ..ops.sharded.layout import BY_COLUMNS, BY_ROWS, as_dtensor, positive, whole_shape


class _BoraParallel(ParallelStyle):
    _parameters: dict[str, Placement]
    _input_layout: Placement  # what the product takes, and what a plain tensor is taken for by default
    _output_layout: Placement

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        for name, layout in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
            if not isinstance(layout, (Placement, type(None))):
                raise TypeError(f"{name} must be a Placement or None, got {type(layout).__name__}")
        self.input_layouts = input_layouts or self._input_layout
        self.output_layouts = output_layouts or self._output_layout
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, FusedBoraLinear):
            raise TypeError(f"module must be a FusedBoraLinear, got {type(module).__name__}")
        if module.merged:
            raise ValueError(
                "module must not be merged when it is parallelized, got a merged one: call unmerge() first"
            )
        module.placements = self.input_layouts, self.output_layouts
        # PyTorch types the hooks as without a result, for any module
        hooks = self._prepare_input, self._prepare_output
        return distribute_module(module, device_mesh, self._distribute, *hooks)  # type: ignore[arg-type]

    def _distribute(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(
                parameter, device_mesh, [self._parameters[name]], src_data_rank=self.src_data_rank
            )
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))

    def _prepare_input(self, module: FusedBoraLinear, inputs: tuple, device_mesh: DeviceMesh) -> Tensor:
        x = inputs[0]
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
        if not isinstance(x, DTensor):
            if type(x) is Tensor and self.use_local_output and not (module.merged or torch.compiler.is_compiling()):
                return x  # without DTensors on both ends: they are a third of the layer's host time
            placement = positive(self.input_layouts, x.ndim)
            shape = whole_shape(x, placement, module.in_features, device_mesh)
            x = as_dtensor(x.contiguous(), device_mesh, placement, shape)
        # the layer brings x to where it needs it, beside its norms; a merged layer is PyTorch's linear
        return x.redistribute(placements=[self._input_layout], async_op=True) if module.merged else x

    def _prepare_output(self, module: FusedBoraLinear, y: Tensor, device_mesh: DeviceMesh) -> Tensor:
        if not isinstance(y, DTensor):
            return y
        if tuple(y.placements) != (self.output_layouts,):
            y = y.redistribute(placements=[self.output_layouts], async_op=True)
        return y.to_local() if self.use_local_output else y

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, output_layouts={self.output_layouts}, "
            f"use_local_output={self.use_local_output})"
        )


class BoraColwiseParallel(_BoraParallel):
    """Shards out_features, as ``ColwiseParallel`` does for ``nn.Linear``.

    y[..., shard] = x·W'[shard, :]ᵀ + bias[shard]: weight, lora_B, magnitude_row and bias are sharded over rows, lora_A
    and magnitude_col are replicated. Besides what ``ColwiseParallel`` sends, column norms take an all-reduce of K
    floats in forward, and dA and the column sums one of (R + 1)·K in backward (exact gradients: two).

    Args:
        input_layouts: what a plain input is; ``Replicate()`` by default, ``Shard(1)`` for sequence parallel input
            [batch, sequence, in_features]. An input that is a DTensor says so itself.
        output_layouts: what the output is brought to; ``Shard(-1)`` by default.
        use_local_output: return this rank's part instead of a DTensor.

    Raises:
        TypeError, ValueError: where applied to another module or to a merged one; in forward, for an input that does
            not fit, before any communication.

    Source: Megatron-LM, arXiv 1909.08053, section 3; sequence parallelism arXiv 2205.05198, section 4.2.2.
    """

    _parameters = BY_ROWS
    _input_layout = Replicate()
    _output_layout = Shard(-1)


class BoraRowwiseParallel(_BoraParallel):
    """Shards in_features, as ``RowwiseParallel`` does for ``nn.Linear``.

    y = Σ_shards x[..., shard]·W'[:, shard]ᵀ + bias: weight, lora_A and magnitude_col are sharded over columns, lora_B,
    magnitude_row and bias are replicated. Besides what ``RowwiseParallel`` sends, row norms take an all-reduce of N
    floats in forward, and dB and the row sums one of (R + 1)·N in backward (exact gradients: two).

    Args:
        input_layouts: what a plain input is; ``Shard(-1)`` by default.
        output_layouts: what the output is brought to; ``Replicate()`` by default (an all-reduce), ``Shard(1)`` for
            sequence parallel output (a reduce-scatter).
        use_local_output: return this rank's part instead of a DTensor.

    Raises:
        TypeError, ValueError: as ``BoraColwiseParallel``.

    Source: as ``BoraColwiseParallel``.
    """

    _parameters = BY_COLUMNS
    _input_layout = Shard(-1)
    _output_layout = Replicate()
