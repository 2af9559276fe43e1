"""Launches of every kernel as the package makes them, recorded and not made: no GPU is needed."""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import dataclass
from importlib import import_module

import torch

from bora_kernels import kernels
from bora_kernels.contract import Adapter, Needs, Options, Slots, separate_product
from bora_kernels.kernels import (
    add,
    gated,
    joint_config,
    moments,
    nf4,
    products,
    rms,
    shared_sums,
    weight_or_v,
)
from bora_kernels.ops import triton_backend
from bora_kernels.ops.triton_parts import product_precision

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
MODULES = [import_module(f"{kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]


def _kernels_of(module) -> dict:
    """What is launched there, by its name."""
    return {name: value for name, value in vars(module).items() if name.endswith("_kernel")}


KERNELS = {name for module in MODULES for name in _kernels_of(module)}


@dataclass(frozen=True)
class Case:
    """One layer whose launches are recorded."""

    dtype: torch.dtype
    R: int
    M: int = 8192
    N: int = 4096
    K: int = 4096
    order: str = "row_col"
    bias: bool = False
    dropout: bool = False
    half_adapter: bool = False  # in dtype, in place of float32

    def __str__(self) -> str:
        flags = "-bias" * self.bias + "-dropout" * self.dropout + "-half" * self.half_adapter
        return f"M{self.M}-N{self.N}-K{self.K}-R{self.R}-{TYPES[self.dtype]}-{self.order}{flags}"


class Recorder:
    """Stands in for a kernel: keeps the arguments of each launch."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def record(*tensors, **arguments):
            names = inspect.signature(self.kernel.fn).parameters
            self.launches.append((self.kernel, dict(zip(names, tensors, strict=False)) | arguments))

        return record


def record(monkeypatch) -> list:
    """The launches from now on, in a list that grows."""
    recorded = []
    for module in MODULES:
        for name, kernel in _kernels_of(module).items():
            monkeypatch.setattr(module, name, Recorder(kernel, recorded))
    return recorded


def run_layer(case: Case) -> None:
    """Forward and backward of a layer, as ``autograd`` calls the backend, on uninitialized tensors."""
    x, weight = torch.empty(case.M, case.K, dtype=case.dtype), torch.empty(case.N, case.K, dtype=case.dtype)
    adapter_dtype = case.dtype if case.half_adapter else torch.float32
    lora_A, lora_B = (torch.empty(*shape, dtype=adapter_dtype) for shape in ((case.R, case.K), (case.N, case.R)))
    magnitudes = torch.empty(case.N), torch.empty(case.K)
    bias = torch.empty(case.N, dtype=case.dtype) if case.bias else None
    seed = torch.zeros(1, dtype=torch.int64) if case.dropout else None
    dropout_p = 0.1 if case.dropout else 0.0
    adapter, options = Adapter(lora_A, lora_B, *magnitudes), Options(2.0, case.order, dropout_p=dropout_p)
    y, product, u, scales = triton_backend.forward(
        x, weight, adapter, None, bias, seed, options, products=True, save_product=True
    )
    product = product if separate_product(case.dtype, bias) else y
    triton_backend.backward(
        torch.empty_like(y), x, weight, adapter, scales, product, u, seed, options, Needs(True, True, True, True, True)
    )
    triton_backend.weighted_sums(weight, lora_B, lora_A.T, None, scaling=2.0)  # of a shard
    for signed in (False, True):
        triton_backend.weighted_sums(
            weight.T, lora_A.T, lora_B, magnitudes[0], torch.empty(4), scaling=2.0, signed=signed
        )


def run_reads(N: int, K: int, R: int) -> None:
    """Reads of a bfloat16 weight over rows and columns, with the factors as layers have them."""
    weight, first = torch.empty(N, K, dtype=torch.bfloat16), torch.empty(4)
    for W, factor in ((weight, torch.empty(R, K).T), (weight.T, torch.empty(N, R))):
        moments.moments(W, factor, None, "tf32", cleared=first)
        moments.moments(W, factor, torch.empty(W.shape[1]), "tf32", squares_needed=False)


def run_sums(N: int, K: int, R: int) -> None:
    """Sums over an adapted bfloat16 weight of many ranks, as norms and norm paths ask for them."""
    weight, A, B = torch.empty(N, K, dtype=torch.bfloat16), torch.empty(R, K), torch.empty(N, R)
    for W, P, Z in ((weight, B, A.T), (weight.T, A.T, B)):
        c = torch.empty(W.shape[1])
        products.sums_over(W, P, Z, None, 2.0, "tf32x3", cleared=torch.empty(4), out=torch.empty(P.shape))
        products.sums_over(W, P, Z, c, 2.0, "tf32x3")
        products.sums_over(W, P, Z, c, 2.0, "tf32x3", squares_needed=False, in_place=True)


def run_dequantization(dtype: torch.dtype, block: int, nested: bool) -> None:
    """A 4-bit weight made dense, on uninitialized tensors."""
    absmax = torch.empty(4096 * 4096 // block, dtype=torch.uint8 if nested else torch.float32)
    parts = (torch.empty(4096 * 2048, 1, dtype=torch.uint8), torch.empty(16), absmax)
    parts += (torch.empty(len(absmax) // 256), torch.empty(256), torch.empty(())) if nested else ()
    nf4.dequantize_nf4(parts, (4096, 4096), (block, 256) if nested else (block,), dtype)


def run_mixed_batch(dtype: torch.dtype, M: int, R: int, N: int = 4096, K: int = 4096, factors=None) -> None:
    """A batch of several adapters, on uninitialized tensors."""
    x, weight, bias = (torch.empty(shape, dtype=dtype) for shape in ((M, K), (N, K), (N,)))
    lora_A, lora_B = (torch.empty(8, R, size, dtype=factors or dtype) for size in (K, N))
    index = torch.empty(4, M, dtype=torch.int32)
    slots = Slots(lora_A, lora_B, torch.empty(8, N), torch.empty(8, K))
    triton_backend.mixed_linear(x, weight, bias, index, slots, 1)


def run_gate(case: Case) -> None:
    """The gate of an MLP and its backward, with each activation."""
    e, f, dh = (torch.empty(case.M, case.N, dtype=case.dtype) for _ in range(3))
    for activation in ("silu", "gelu", "gelu_tanh"):
        gated.gate(e, f, activation)
        gated.gate_backward(e, f, dh, activation)
    add.add(e, f)
    if case.R > joint_config.joint_rank(case.dtype):
        return
    whole = [gated.Side(torch.empty(case.N), torch.empty(case.M, case.R), True) for _ in range(3)]
    frozen = gated.Side(None, None, False)
    for activation in ("silu", "gelu", "gelu_tanh"):
        gated.gate_sums(e, f, dh, tuple(whole), activation, precision=product_precision(case.dtype))
    gated.gate_sums(e, f, dh, (whole[0], frozen, frozen), "silu", precision="ieee")


def run_shared_sums(case: Case) -> None:
    """Sums of two and three layers that read one x, on uninitialized tensors."""
    if case.R > joint_config.joint_rank(case.dtype):
        return
    x, precision = torch.empty(case.M, case.K, dtype=case.dtype), product_precision(case.dtype)
    share = shared_sums.Share(torch.empty_like(x), torch.empty(case.M, case.R), True, torch.empty(4))
    for shares in ([share] * 3, [share] * 2, [share._replace(v=None), share._replace(total=False, word=None)]):
        shared_sums.shared_sums(x, shares, precision=precision)


def run_weight_or_v(weight_dtype: torch.dtype, dtype: torch.dtype, R: int, K: int) -> None:
    """The weight of a convolution, in both memory formats."""
    weight, A, B = torch.empty(640, K, 9, dtype=weight_dtype), torch.empty(R, K, 9), torch.empty(640, R)
    powers = (torch.empty(640), torch.empty(K)) if dtype == torch.float16 else (None, None)
    for last in (False, True):
        if last:
            weight, A = weight.view(640, 9, K), A.view(R, 9, K)
        weight_or_v.weight_or_v(weight, A, B, torch.empty(4), *powers, scaling=2.0, channels_last=last, dtype=dtype)


def run_norm(dtype: torch.dtype, K: int) -> None:
    """RMSNorm and its backward."""
    x, weight = torch.empty(1000, K, dtype=dtype), torch.empty(K, dtype=dtype)
    rms.rms_norm(x, weight, 1.0, 1e-6)
    rms.rms_norm_backward(x, x, weight, 1.0, 1e-6)
