"""The methods that are compared, and a linear layer under each of them, for many runs at once.

A *run* is one training; R runs with seeds and learning rates of their own are trained together, over one W0 that they
share. W' is never made. For x [R, T, K], factors A [R, r, K] and B [R, N, r], magnitudes [R, N] and [R, K]:

    y = a⊙[(x⊙g)·W0ᵀ + s·((x⊙g)·Aᵀ)·Bᵀ] + bias        a = m_r / ρ, g = m_c / γ, 1 without the magnitude

and the norms of V = W0 + s·B·A, weighted by the square q of the scale that comes first, follow from products of W0 with
thin matrices:

    ‖V_n·√q‖² = Σ_k q_k·W0²_nk + 2s·Σ_r B_nr·(W0·diag(q)·Aᵀ)_nr + s²·(B·(A·diag(q)·Aᵀ)·Bᵀ)_nn

All is differentiated by autograd; a detached norm is a constant.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bora_kernels.contract import NormOrder

Parameters = dict[
    str, Tensor
]  # "<layer>.A", ".B", ".row", ".col", or ".weight" and ".bias"; stacked over runs [R, ...]


@dataclass(frozen=True)
class Method:
    """What is trained of a linear layer."""

    label: str
    factors: bool = False  # A and B
    extra_rank: int = 0
    row: bool = False  # magnitudes and norms of rows (output features)
    col: bool = False
    detached: bool = False
    order: NormOrder = "row_col"
    full: bool = False  # the weight itself, and biases and norms

    @property
    def is_adapter(self) -> bool:
        return self.factors or self.row or self.col


METHODS = {
    "bora": Method("BoRA", factors=True, row=True, col=True),
    "lora_r1": Method("LoRA, rank r + 1", factors=True, extra_rank=1),
    "dora": Method("DoRA (detached)", factors=True, row=True, detached=True),
    "lora": Method("LoRA", factors=True),
    "full": Method("full fine-tuning", full=True),
    "dora_exact": Method("DoRA, exact", factors=True, row=True),
    "bora_cr": Method("BoRA, columns first", factors=True, row=True, col=True, order="col_row"),
    "bora_detached": Method("BoRA, detached", factors=True, row=True, col=True, detached=True),
    "columns": Method("columns only", factors=True, col=True),
    "scales": Method("scales only", row=True, col=True),
    "head": Method("head only"),
}
PRIMARY = ("bora", "lora_r1", "dora")
CONTRASTS = (("bora", "lora_r1"), ("bora", "dora"))  # the primary ones
OTHER_CONTRASTS = (
    ("bora", "lora"), ("bora", "dora_exact"), ("dora", "lora"), ("dora", "lora_r1"), ("dora_exact", "dora"),
    ("bora_cr", "bora"), ("bora_detached", "bora"), ("columns", "dora"), ("columns", "lora"), ("bora", "full"),
)  # fmt: skip


def initial_parameters(method: Method, weights: Mapping[str, Tensor], seeds: list[int], rank: int) -> Parameters:
    """The trained tensors at their start; equal for equal seeds in all methods, whatever else is in the batch."""
    parameters, R = {}, len(seeds)
    rank += method.extra_rank
    for index, (name, weight) in enumerate(weights.items()):
        N, K = weight.shape
        if method.full:
            parameters[f"{name}.weight"] = weight.expand(R, N, K).clone()
        if method.factors:
            draws = {seed: uniform(1000 * seed + index, rank, K) / math.sqrt(K) for seed in set(seeds)}
            parameters[f"{name}.A"] = torch.stack([draws[seed] for seed in seeds]).to(weight.device)
            parameters[f"{name}.B"] = weight.new_zeros(R, N, rank)
        if method.row:
            parameters[f"{name}.row"] = weight.norm(dim=1).expand(R, N).clone()
        if method.col:
            parameters[f"{name}.col"] = weight.norm(dim=0).expand(R, K).clone()
    return parameters


def uniform(seed: int, *shape: int) -> Tensor:
    """Numbers in [-1, 1), on the CPU, from the seed alone."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Layers:
    """All adapted linear layers of a model in one batch of runs."""

    def __init__(
        self,
        method: Method,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        parameters: Parameters,
        scaling: float,
    ) -> None:
        self.method, self.weights, self.biases, self.scaling = method, weights, biases, scaling
        self.parameters = parameters
        self._squares: dict[str, Tensor] = {}

    def parameter(self, name: str, part: str) -> Tensor:
        return self.parameters[f"{name}.{part}"]

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [R, r, K] and B [R, N, r], or None for a method without."""
        return (self.parameter(name, "A"), self.parameter(name, "B")) if self.method.factors else None

    def __call__(self, name: str, x: Tensor, scales: tuple[Tensor | None, Tensor | None] | None = None) -> Tensor:
        """x [R, T, K] -> y [R, T, N]. ``scales`` are those of the layer where they are known already."""
        weight, bias = self.weights[name], self.biases.get(name)
        if self.method.full:
            y = x @ self.parameter(name, "weight").mT
            return y if bias is None else y + self.parameter(name, "bias")
        if not self.method.is_adapter:
            return F.linear(x, weight, bias)
        factors = self.factors(name)
        row_scale, col_scale = self.scales(name) if scales is None else scales
        x = x if col_scale is None else x * col_scale[:, None]
        y = F.linear(x, weight)
        if factors is not None:
            A, B = factors
            y = torch.baddbmm(y, x @ A.mT, B.mT, alpha=self.scaling)
        y = y if row_scale is None else y * row_scale[:, None]
        return y if bias is None else y + bias

    def effective_weight(self, name: str) -> Tensor:
        """W' [R, N, K] of one layer, dense: to look at, not to train with."""
        if self.method.full:
            return self.parameter(name, "weight")
        weight, factors = self.weights[name], self.factors(name)
        if not self.method.is_adapter:
            return weight[None]
        row_scale, col_scale = self.scales(name)
        if factors is not None:
            A, B = factors
            with full_precision():
                weight = torch.baddbmm(weight, B, A, alpha=self.scaling)
        weight = weight if row_scale is None else weight * row_scale[..., None]
        return weight if col_scale is None else weight * col_scale[:, None]

    def scales(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """a [R, N] and g [R, K]; None without the magnitude. In full float32: a scale near 1 is what is learned."""
        method, factors, found, before = self.method, self.factors(name), {}, None
        P, Q = (None, None) if factors is None else (factors[1], factors[0].mT)
        for axis in method.order.split("_"):
            if not getattr(method, axis):
                continue
            weight, square = self.weights[name], self._square(name)
            sides = (weight, square, P, Q) if axis == "row" else (weight.T, square.T, Q, P)
            with full_precision():
                squares = squared_norms(*sides, self.scaling, before)
            inverse = squares.rsqrt()  # no row and no column of these models is zero
            found[axis] = self.parameter(name, axis) * (inverse.detach() if method.detached else inverse)
            before = found[axis].square() if method.row and method.col else None
        return found.get("row"), found.get("col")

    def _square(self, name: str) -> Tensor:
        if name not in self._squares:
            self._squares[name] = self.weights[name].square()
        return self._squares[name]


def squared_norms(
    weight: Tensor, square: Tensor, P: Tensor | None, Q: Tensor | None, scaling: float, q: Tensor | None
) -> Tensor:
    """Of the rows of (weight + scaling·P·Qᵀ)·diag(√q), for each run [R, N] (without P and q: [1, N]).

    Shapes: weight and its square [N, K], P [R, N, r], Q [R, K, r], q [R, K]; None of P and Q for no update, of q for
    ones.
    """
    base = square.sum(1)[None] if q is None else q @ square.T
    if P is None or Q is None:
        return base
    Q_weighted = Q if q is None else q[..., None] * Q
    cross = (Q_weighted.mT.flatten(0, 1) @ weight.T).view(len(P), -1, len(weight)).mT  # one product for all runs
    update = torch.baddbmm(cross, P, Q.mT @ Q_weighted, beta=2 * scaling, alpha=scaling**2)
    return base + (update * P).sum(-1)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
