"""``FusedBoraLinear`` and ``FusedDoraLinear``: drop-in replacements for ``torch.nn.Linear`` with a frozen weight."""

from __future__ import annotations

import functools
import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import quantized
from ._private import tensor_of
from .contract import EPS, Adapter, Backend, Members, NormOrder, Options, given
from .functional import bora_linear
from .merging import Mergeable
from .ops import adapted_weight, elsewhere, loaded_base, reuse, validation, watch
from .quantized.module import QuantizedWeight

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement
    from typing_extensions import Self


class FusedBoraLinear(Mergeable):
    """A frozen linear layer fine-tuned with BoRA.

        V  = weight + scaling·lora_B·lora_A        scaling = alpha / r  (alpha / √r with ``rslora``)
        W' = diag(magnitude_row / ‖·‖_row)·V·diag(magnitude_col / ‖·‖_col)        y = x·W'ᵀ + bias

    ``magnitude_row`` has an entry for each output feature, ``magnitude_col`` for each input feature. They start as the
    norms of the weight and ``lora_B`` as 0, so that the layer starts as the frozen one.

    Args:
        in_features: K.
        out_features: N.
        r: rank of the update, at least 1.
        alpha: numerator of the scaling.
        bias: whether the frozen layer has a bias.
        dropout: probability on the input of the low-rank branch, in training mode.
        norm_order: "row_col" (row norms first) or "col_row".
        detach_norm: constants for norms in backward (DoRA, arXiv 2402.09353, section 4.3) instead of exact gradients.
        rslora: scale by alpha / √r (arXiv 2312.03732).
        device, dtype: of the frozen weight and bias.
        adapter_dtype: of the trained parameters; float32 keeps small updates over a bfloat16 base.

    Raises:
        ValueError, TypeError: for an option out of range or a weight that cannot be read, before anything changes.

    Source: BoRA, arXiv 2412.06441, section 3.
    """

    backend: Backend | None = None  # as in ``bora_linear``; None picks by device
    compute_dtype: torch.dtype | None = None  # over a quantized weight: what inputs are cast to; None leaves them
    adapter_dtype = torch.float32
    place: str | None = None  # its name in the model that was converted, for messages
    placements: tuple[Placement, Placement] | None = None  # of plain x and y over a sharded weight
    members = Members(row=True, col=True)

    weight: Tensor | QuantizedWeight  # W0, frozen
    bias: Tensor | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude_row: nn.Parameter | None
    magnitude_col: nn.Parameter | None
    norm_order: NormOrder

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        alpha: float = 32,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        norm_order: NormOrder = "row_col",
        detach_norm: bool = False,
        rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._setup(linear, r, alpha, dropout, norm_order, detach_norm, rslora, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        alpha: float = 32,
        *,
        dropout: float = 0.0,
        norm_order: NormOrder = "row_col",
        detach_norm: bool = False,
        rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Adapt an existing layer: shares (and freezes) its weight and bias and copies nothing.

        A weight that is quantized stays so: bitsandbytes ``Linear4bit`` and ``Linear8bitLt``, torchao int8 and float8
        weight-only. ``layer.weight`` is then a ``QuantizedWeight``, and ``layer.compute_dtype`` is the layer's.
        Activations are not quantized, whatever the layer did.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        if elsewhere.is_offloaded(linear):
            raise ValueError(
                "linear must hold its weight, got one whose forward was replaced, as accelerate does to offload it: "
                "adapt the model before it is offloaded, or adapt it through PEFT"
            )
        self = cls.__new__(cls)
        with elsewhere.gathered(linear.weight, linear.bias):
            self._setup(linear, r, alpha, dropout, norm_order, detach_norm, rslora, adapter_dtype)
        self.train(linear.training)
        return self

    def _setup(
        self,
        linear: nn.Linear,
        r: int,
        alpha: float,
        dropout: float,
        norm_order: NormOrder,
        detach_norm: bool,
        rslora: bool,
        adapter_dtype: torch.dtype,
    ) -> None:
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"r must be an integer of at least 1, got {r!r}")
        for name, number in (("alpha", alpha), ("dropout", dropout)):
            if not isinstance(number, Real):
                raise TypeError(f"{name} must be a number, got {number!r}")
        if not (isinstance(adapter_dtype, torch.dtype) and adapter_dtype.is_floating_point):
            raise TypeError(f"adapter_dtype must be a floating-point dtype, got {adapter_dtype!r}")
        scaling = alpha / (math.sqrt(r) if rslora else r)
        validation.check_options(Options(scaling, norm_order, detach_norm, dropout))
        stored = quantized.read(linear)
        if stored is None:
            validation.check_weight(linear.weight, "linear.weight")
            if tuple(linear.weight.shape) != (linear.out_features, linear.in_features):
                expected = [linear.out_features, linear.in_features]
                found = list(linear.weight.shape)
                raise ValueError(f"linear.weight must be {expected}, got {found} (packed or sharded)")

        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r, self.alpha, self.rslora, self.scaling = r, alpha, rslora, scaling
        self.dropout, self.norm_order, self.detach_norm = dropout, norm_order, detach_norm
        if stored is None:
            self.weight = linear.weight.requires_grad_(False)
        else:
            self.weight = QuantizedWeight(stored)
            self.compute_dtype = getattr(linear, "compute_dtype", None)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.register_buffer("merged_weight", None, persistent=False)
        self.merged_quantized = None

        self.adapter_dtype = adapter_dtype
        empty = functools.partial(torch.empty, device=linear.weight.device, dtype=adapter_dtype)
        self.lora_A = nn.Parameter(empty(r, self.in_features))
        self.lora_B = nn.Parameter(empty(self.out_features, r))
        row, col = self.members
        self.magnitude_row = nn.Parameter(empty(self.out_features)) if row else None
        self.magnitude_col = nn.Parameter(empty(self.in_features)) if col else None
        self.reset_parameters()
        watch.watch(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start the adapter anew over the present weight: A uniform (Kaiming), B zero, magnitudes the weight's norms.

        The frozen weight is not touched. After ``to_empty`` load the weight first, then call this. Sharded parameters
        (DTensor) start as whole ones would: A is what the first rank draws, norms are reduced over the shards.
        """
        _draw_factor(self.lora_A)
        nn.init.zeros_(self.lora_B)
        norms = adapted_weight.norms(self._dense_weight())
        for magnitude, norm in zip((self.magnitude_row, self.magnitude_col), norms, strict=True):
            if magnitude is not None:
                magnitude.copy_(norm)

    def forward(self, x: Tensor) -> Tensor:
        """y = x·W'ᵀ + bias for x [..., in_features]; returns [..., out_features] in x's dtype."""
        weight, merged = tensor_of(self, "weight"), tensor_of(self, "merged_weight")
        if isinstance(weight, Tensor) and merged is None:
            return self._adapted_linear(x, weight)
        if self.training and self.merged:
            watch.note_merged(self)
        if isinstance(weight, Tensor):
            return nn.functional.linear(x, given(merged), self.bias)
        dtype = self.compute_dtype
        wide = x if dtype is None else x.to(dtype)
        if self.merged_quantized is not None:
            merged = self.merged_quantized.stored().dense(wide.dtype)
        if merged is None:
            y = self._adapted_linear(wide, weight.stored())
        else:
            bias = None if self.bias is None else self.bias.to(wide.dtype)
            y = nn.functional.linear(wide, merged.to(wide.dtype), bias)
        return y if dtype is None else y.to(x.dtype)

    def _adapted_linear(self, x: Tensor, weight: Tensor | quantized.Quantized) -> Tensor:
        return bora_linear(
            x,
            weight,
            tensor_of(self, "lora_A"),
            tensor_of(self, "lora_B"),
            tensor_of(self, "magnitude_row"),
            tensor_of(self, "magnitude_col"),
            tensor_of(self, "bias"),
            scaling=self.scaling,
            norm_order=self.norm_order,
            detach_norm=self.detach_norm,
            dropout_p=self.dropout,
            training=self.training,
            eps=EPS,
            backend=self.backend,
            placements=self.placements,
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None and param.ndim == 2 and "lora_B" in self._parameters:
            N, K = self.lora_B.shape[0], self.lora_A.shape[1]
            if param.shape[1] == K and param.shape[0] != N:  # a head that is tied to resized embeddings
                got = list(param.shape)
                raise ValueError(f"weight must stay [{N}, {K}], got {got}: resize embeddings before adapting")
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        self.unmerge()  # a merged weight would be that of the parameters before
        reuse.forget()  # and so would be scales, where a sharding engine hides the change from autograd's versions
        adapter = Adapter(self.lora_A, self.lora_B, self.magnitude_row, self.magnitude_col)
        alone = not any(f"{prefix}{name}" in state_dict for name in Adapter._fields)
        other = alone and loaded_base.is_replaced(self.weight, state_dict.get(f"{prefix}weight"))
        untrained = other and loaded_base.is_untrained(self._dense_weight(), adapter, self.scaling)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if untrained:
            loaded_base.start_anew(self._dense_weight(), adapter, self.scaling)
        elif other:
            loaded_base.warn()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        watch.watch(self)  # copies, too

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, alpha={self.alpha}",
            f"bias={self.bias is not None}, norm_order={self.norm_order!r}",
        ]
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        parts += ["detach_norm=True"] if self.detach_norm else []
        parts += ["merged=True"] if self.merged else []
        return ", ".join(parts)


def _draw_factor(factor: Any) -> None:
    """Kaiming-uniform in place. Were shards drawn one by one, ranks with equal seeds would repeat each other's rows."""
    if not hasattr(factor, "placements"):  # not a DTensor
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        return
    from torch.distributed.tensor import distribute_tensor

    whole = torch.empty(factor.shape, dtype=factor.dtype, device=factor.to_local().device)
    nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
    factor.copy_(distribute_tensor(whole, factor.device_mesh, factor.placements))


class FusedDoraLinear(FusedBoraLinear):
    """A frozen linear layer fine-tuned with DoRA: ``FusedBoraLinear`` without the column magnitude.

        W' = diag(magnitude_row / ‖V‖_row)·V        V = weight + scaling·lora_B·lora_A

    The magnitude has one entry for each output feature, as in PEFT. Arguments are those of ``FusedBoraLinear``;
    ``norm_order`` has no effect. ``detach_norm=True`` gives the gradient that PEFT computes.

    Source: DoRA, arXiv 2402.09353, sections 4.1 and 4.3.
    """

    members = Members(row=True, col=False)


class FusedColumnLinear(FusedBoraLinear):
    """A frozen linear layer fine-tuned with a magnitude for each input feature: ``FusedBoraLinear`` without the row's.

        W' = V·diag(magnitude_col / ‖V‖_col)        V = weight + scaling·lora_B·lora_A

    What DoRA is for the rows of the weight, for its columns: the member of the family that tells in an ablation what
    the column magnitude brings alone. Arguments are those of ``FusedBoraLinear``; ``norm_order`` has no effect.

    Source: BoRA, arXiv 2412.06441, section 3.
    """

    members = Members(row=False, col=True)
