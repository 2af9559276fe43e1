"""Inputs of the layer for tests, and how a backend is run on them and held to the reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from conftest import HAS_TRITON, INTERPRETING
from helpers import interpreter_bf16
from helpers.accuracy import FLOOR, as_one, assert_accurate
from torch import Tensor

from bora_kernels import bora_linear
from bora_kernels.reference import bora_linear_ref

MEMBERS = {
    "bora": (),
    "dora": ("magnitude_col",),
    "columns": ("magnitude_row",),
    "lora": ("magnitude_row", "magnitude_col"),
}  # what is absent
VARIANTS = [("bora", "row_col"), ("bora", "col_row"), ("dora", "row_col"), ("columns", "row_col"), ("lora", "row_col")]
TRAINED = ("x", "lora_A", "lora_B", "magnitude_row", "magnitude_col", "bias")
SCALING = 0.5
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HALVES = (torch.bfloat16, torch.float16)

backends = pytest.mark.parametrize("backend", ["torch", "triton"])
variants = pytest.mark.parametrize("member, order", VARIANTS, ids=map("-".join, VARIANTS))
orders = pytest.mark.parametrize("order", ["row_col", "col_row"])
conventions = pytest.mark.parametrize("detach_norm", [False, True], ids=["exact", "detached"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=NAMES.get)


@dataclass(frozen=True)
class Case:
    """Sizes, dtypes, the member of the family and the order of its norms."""

    M: int = 17
    N: int = 123
    K: int = 96
    R: int = 8
    dtype: torch.dtype = torch.float32
    member: str = "bora"
    order: str = "row_col"
    adapter_dtype: torch.dtype = torch.float32
    bias: bool = True
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"M{self.M}-N{self.N}-K{self.K}-R{self.R}-{NAMES[self.dtype]}-{self.order}"]
        parts += [self.member] if self.member != "bora" else []
        parts += [f"{NAMES[self.adapter_dtype]}adapter"] if self.adapter_dtype != torch.float32 else []
        parts += ["nobias"] if not self.bias else []
        return "-".join(parts)

    def inputs(self, device: str) -> dict[str, Tensor | None]:
        """The tensors of a layer after some training; one magnitude of each kind is negative."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        M, N, K, R = self.M, self.N, self.K, self.R
        adapter_dtype = torch.float64 if self.dtype == torch.float64 else self.adapter_dtype
        weight = (randn(N, K) / K**0.5).to(self.dtype)
        norms = {"magnitude_row": weight.float().norm(dim=1), "magnitude_col": weight.float().norm(dim=0)}
        tensors = {"x": randn(M, K).to(self.dtype), "weight": weight}
        tensors |= {"lora_A": randn(R, K) / K**0.5, "lora_B": randn(N, R) / R**0.5}
        for name, norm in norms.items():
            tensors[name] = norm * (1 + 0.1 * randn(*norm.shape))
            tensors[name][1:2] *= -1
        for name in TRAINED[1:5]:
            tensors[name] = tensors[name].to(adapter_dtype)
        tensors["bias"] = randn(N).to(self.dtype) if self.bias else None
        return tensors | dict.fromkeys(MEMBERS[self.member])

    def upstream(self, device: str) -> Tensor:
        """The gradient [M, N] that comes in from above."""
        generator = torch.Generator(device).manual_seed(self.seed + 1)
        return torch.randn((self.M, self.N), generator=generator, device=device).to(self.dtype)


def cancelled(inputs: dict[str, Tensor | None], axis: str, left: float) -> dict[str, Tensor | None]:
    """The inputs with an update that leaves of the second row or column (the first of one) ``left`` times W0."""
    W, A, B = inputs["weight"].float(), inputs["lora_A"].clone(), inputs["lora_B"].clone()
    first, second = (B, A.T) if axis == "row" else (A.T, B)
    line = min(1, len(first) - 1)
    second[:, 0] = W[line] if axis == "row" else W[:, line]
    first[:, 0] *= 0.1
    first[line] = 0.0
    first[line, 0] = (left - 1) / SCALING
    return inputs | {"lora_A": A, "lora_B": B}


def undone(inputs, axis, left):
    """``cancelled``, with what is left of the line in another direction than W0's, so that no gradient is 0 for it."""
    inputs = cancelled(inputs, axis, 0.0)
    name = "lora_A" if axis == "row" else "lora_B"
    factor = inputs[name] if axis == "row" else inputs[name].T
    generator = torch.Generator(factor.device).manual_seed(1)
    noise = torch.randn(factor.shape[1], generator=generator, device=factor.device)
    factor[0] += left * factor[0].norm() * noise / noise.norm()
    return inputs


def require(backend: str, dtype: torch.dtype) -> None:
    """Skip where the backend cannot run, or where the interpreter would get bfloat16 wrong."""
    if backend == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    if backend == "triton" and INTERPRETING and dtype == torch.bfloat16:
        if reason := interpreter_bf16.unsupported_reason():
            pytest.skip(reason)


def run(
    layer, inputs: dict[str, Tensor | None], dy: Tensor, *, trained=TRAINED, dtype=None, **options
) -> dict[str, Tensor]:
    """The output and the gradients of those in ``trained``; all are leaves that keep their strides."""
    leaves = {
        name: None if t is None else t.detach() if dtype is None else t.detach().to(dtype) for name, t in inputs.items()
    }
    asked = {f"d_{name}": leaves[name].requires_grad_() for name in trained if leaves[name] is not None}
    y = layer(**leaves, **options)
    gradients = torch.autograd.grad(y, list(asked.values()), dy.to(y.dtype)) if asked else ()
    return {"y": y.detach(), **dict(zip(asked, gradients, strict=True))}


def check_layer(
    backend: str, inputs: dict[str, Tensor | None], dy: Tensor, *, floor: float = FLOOR, **options
) -> dict[str, Tensor]:
    """Hold the output and all gradients of a backend to the accuracy rule; returns them.

    ``options`` are those of ``run_beside_reference``.
    """
    actual, plain, exact, terms = run_beside_reference(backend, inputs, dy, **options)
    N, K, R = *inputs["weight"].shape, inputs["lora_A"].shape[0]
    samples = min(N, K, inputs["x"].numel() // K * R)
    assert_accurate(actual, plain, exact, samples=samples, terms=terms, floor=floor)
    return actual


def check_together(
    backend: str,
    layers: Iterable[tuple[dict[str, Tensor | None], Tensor]],
    *,
    shares: dict[str, float] | None = None,
    **options,
) -> None:
    """Hold each result of several layers, given as inputs and dy, to the accuracy rule as one tensor (``as_one``).

    ``shares`` of what plain PyTorch errs count for results that are known to be better.
    """
    results = [run_beside_reference(backend, inputs, dy, **options) for inputs, dy in layers]
    actual, plain, exact, terms = as_one(results)
    for name, share in (shares or {}).items():
        plain[name] = (exact[name] + share * (plain[name] - exact[name])).to(plain[name].dtype)
    assert_accurate(actual, plain, exact, samples=len(results), terms=terms)


def run_beside_reference(
    backend: str,
    inputs: dict[str, Tensor | None],
    dy: Tensor,
    *,
    layer=bora_linear,
    mask: Tensor | None = None,
    seed: int | None = None,
    trained=TRAINED,
    **options,
) -> tuple[dict[str, Tensor], ...]:
    """What a backend makes of a layer, and the dense reference: in the same dtypes, in float64, and with its terms.

    ``layer`` may wrap ``bora_linear``, as in autocast. With dropout, ``seed`` is set before the backend runs and
    ``mask`` says what it is known to keep then.
    """
    options = {"scaling": SCALING, "trained": trained, **options}
    require(backend, inputs["x"].dtype)
    if seed is not None:
        torch.manual_seed(seed)
    actual = run(layer, inputs, dy, backend=backend, **options)

    twin = {"dropout_mask": mask, **options}
    plain = run(bora_linear_ref, inputs, dy, **twin)
    exact = run(bora_linear_ref, inputs, dy, dtype=torch.float64, **twin)
    terms = run(bora_linear_ref, inputs, dy, dtype=torch.float64, **(twin | {"detach_norm": True}))
    return actual, plain, exact, terms
