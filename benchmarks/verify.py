"""A result counts only if it is right: every provider is held to the reference on the workload that is timed.

    ‖out − exact‖  ≤  factor·(1 + 2/√n)·‖plain − exact‖ + floor·‖exact‖

``exact`` is the dense reference in float64 (in float32 for a half-precision model), ``plain`` the dense reference
in the provider's own dtypes, n the elements compared. The factor is 2 for this package. Peers get 8: they have
to compute the same function, but where they round is their own choice. How far each is from plain is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .adapting import Adapter, Formula, dense, install
from .models import Workload
from .providers import Provider

OWN_FACTOR, PEER_FACTOR = 2.0, 8.0
FLOOR = 5e-7  # four units in the last place of float32
FLOOR_DEEP = 5e-6  # for a stack, which hands the roundings of a layer on to the next ones

Result = dict[str, list[Tensor]]  # "y", "dx", "d_lora_A", ...: one tensor, or one for each target


class WrongResult(AssertionError):
    """A provider whose output or gradients are not those of its formula."""


def make_step(module: nn.Module, x: Tensor, dy: Tensor, adapters: list[Adapter], mode: str) -> Callable[[], tuple]:
    """A step with as little of Python around it as can be: returns y and, in mode "step", all gradients."""
    if mode == "inference":

        def step() -> tuple:
            with torch.no_grad():
                return (module(x),)

    elif mode == "forward":

        def step() -> tuple:
            return (module(x),)

    else:
        inputs = [x, *(parameter for adapter in adapters for parameter in adapter.values())]

        def step() -> tuple:
            y = module(x)
            return (y, *torch.autograd.grad(y, inputs, dy))

    return step


def named(tensors: tuple, adapters: list[Adapter]) -> Result:
    """What a step returned, by kind."""
    names = ["y", "dx", *(f"d_{kind}" for adapter in adapters for kind in adapter)]
    result: Result = {}
    for name, tensor in zip(names, tensors, strict=False):  # there may be y alone
        result.setdefault(name, []).append(tensor.detach())
    return result


class References:
    """The exact results of a workload and the errors of plain PyTorch, each made once, when first asked for."""

    def __init__(self, workload: Workload, rank: int) -> None:
        self.workload, self.rank = workload, rank
        self._exact: dict[Formula, Result] = {}
        self._plain: dict[tuple[Formula, torch.dtype], dict[str, float]] = {}

    def exact(self, formula: Formula) -> Result:
        if formula not in self._exact:
            half = self.workload.x.dtype != torch.float32
            dtype = torch.float32 if half and not self.workload.is_layer else torch.float64
            self._exact[formula] = self._dense(formula, torch.float32, dtype)
        return self._exact[formula]

    def plain_errors(self, formula: Formula, adapter_dtype: torch.dtype) -> dict[str, float]:
        key = (formula, adapter_dtype)
        if key not in self._plain:
            self._plain[key] = errors(self._dense(formula, adapter_dtype), self.exact(formula))
        return self._plain[key]

    def _dense(self, formula: Formula, adapter_dtype: torch.dtype, dtype: torch.dtype | None = None) -> Result:
        root = self.workload.copy(self.workload.dense, share=dtype is None)
        adapters = install(dense(formula), root, self.workload, self.rank, adapter_dtype)
        x, dy = self.workload.x, self.workload.dy
        if dtype is not None:
            root, x, dy = root.to(dtype), x.to(dtype), dy.to(dtype)
        self.workload.set_mode(root, training=True, checkpointing=True)  # a stack in float32 needs the memory
        step = make_step(self.workload.callable(root), x.detach().requires_grad_(), dy, adapters, "step")
        return named(step(), adapters)

    def check(self, actual: Result, provider: Provider, adapter_dtype: torch.dtype) -> float:
        """Hold a result to the rule; returns its largest error as a multiple of plain PyTorch's.

        Raises:
            WrongResult: naming everything that is off, by how much, and what was allowed.
        """
        exact = self.exact(provider.formula)
        plain = self.plain_errors(provider.formula, adapter_dtype)
        factor = OWN_FACTOR if provider.ours else PEER_FACTOR
        floor = FLOOR if self.workload.is_layer else FLOOR_DEEP
        worst, wrong = 0.0, []
        for kind, error in errors(actual, exact).items():
            size = sum(tensor.numel() for tensor in exact[kind])
            bound = factor * (1 + 2 / math.sqrt(size)) * plain[kind] + floor
            if not error <= bound:  # true for NaN
                wrong.append(f"{kind} is off by {error:.2e}, allowed is {bound:.2e} (plain PyTorch {plain[kind]:.2e})")
            worst = max(worst, error / max(plain[kind], floor))
        if wrong:
            raise WrongResult(f"{provider.name} computes a wrong result: " + "; ".join(wrong))
        return worst


def errors(actual: Result, exact: Result) -> dict[str, float]:
    """Relative norm-wise error of each kind, over all its tensors."""
    result = {}
    for kind, tensors in actual.items():
        pairs = list(zip(tensors, exact[kind], strict=True))
        for value, reference in pairs:
            if value.shape != reference.shape:
                raise WrongResult(f"{kind} is {list(value.shape)}, the reference {list(reference.shape)}")
        error = math.hypot(*(_norm(value.to(reference.dtype) - reference) for value, reference in pairs))
        result[kind] = error / (math.hypot(*(_norm(reference) for _, reference in pairs)) or 1.0)
    return result


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor).item()
