"""Every kernel, in every configuration that a launch would choose, compiles for GPUs that this machine does not have.

Compilers take half a second for each: all are compiled for sm_90, and for every other GPU as few as have every tile and
every value of every argument. With --every-variant all are compiled for all, as is right when kernels change.

Launches are recorded, not made up: ``fused`` runs on CPU tensors with the kernels replaced by recorders, so that what
is compiled is what a real launch on the target would compile.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import triton
import triton.language as tl
from helpers.cross_compile import (
    SHARED_MEMORY_LIMIT,
    CompileError,
    CompileRequest,
    cross_compile_all,
    some_of_each_kernel,
)
from triton.tools.tensor_descriptor import TensorDescriptor

from bora_kernels.contract import Adapter, Needs, Options, Slots, separate_product
from bora_kernels.kernels import (
    add,
    combine,
    config,
    gated,
    gemm,
    gemm_of_v,
    gram,
    low_rank,
    mixed,
    mixed_config,
    mixed_few,
    mixed_project,
    moments,
    nf4,
    norms,
    rms,
    tail,
    weight_or_v,
)
from bora_kernels.ops import triton_backend

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
# ptxas spills a register or two to raise occupancy even where a thread has 40 of its 255. Of what Triton 3.6 makes,
# four finishing kernels for more than 64 ranks spill more, up to 96 bytes on sm_80
TOLERATED_SPILL_BYTES = 32 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 96
# of launches that may begin while the one before runs: these read a stage's inputs before they wait for its end
READ_INPUTS_EARLY = {"_linear_few_kernel", "_parts_kernel", "_add_parts_kernel"}
PROCESSORS = {80: 108, 90: 132, 100: 148, "gfx942": 304}


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

    def __str__(self) -> str:
        flags = "-bias" * self.bias + "-dropout" * self.dropout
        return f"M{self.M}-N{self.N}-K{self.K}-R{self.R}-{TYPES[self.dtype]}-{self.order}{flags}"


CASES = (
    Case(torch.bfloat16, 16),
    Case(torch.bfloat16, 64, order="col_row", bias=True),
    Case(torch.bfloat16, 512, N=1024),
    Case(torch.bfloat16, 8, M=8),
    Case(torch.bfloat16, 64, M=512, dropout=True),
    Case(torch.bfloat16, 16, M=1500),  # from here on every tile of ``tiles``, alone and as a part of a larger one
    Case(torch.float16, 16, M=1000, N=5120, K=5120, bias=True),
    Case(torch.bfloat16, 16, M=3000, N=2048, K=8192, bias=True),
    Case(torch.bfloat16, 64, M=5000, N=3584, K=512, bias=True),
    Case(torch.bfloat16, 16, M=700, N=1024, K=4096, bias=True),
    Case(torch.bfloat16, 16, M=512, N=3584, K=18944, bias=True),
    Case(torch.bfloat16, 16, M=512, bias=True),
    Case(torch.bfloat16, 24, M=700, N=4093, K=4095),  # rows that no descriptor can address
    Case(torch.float16, 16, M=2048, bias=True, dropout=True),
    Case(torch.float32, 16, order="col_row"),
    Case(torch.float32, 64, M=500, bias=True, dropout=True),
)


class Recorder:
    """Stands in for a kernel: keeps the arguments of each launch."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def record(*tensors, **arguments):
            names = inspect.signature(self.kernel.fn).parameters
            self.launches.append((self.kernel, dict(zip(names, tensors, strict=False)) | arguments))

        return record


@pytest.fixture
def launches(monkeypatch):
    recorded = []
    for module in (
        add,
        combine,
        gated,
        gemm,
        gemm_of_v,
        gram,
        low_rank,
        mixed,
        mixed_few,
        mixed_project,
        moments,
        nf4,
        norms,
        rms,
        tail,
        weight_or_v,
    ):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel, recorded))
    return recorded


def run_layer(case: Case) -> None:
    """Forward and backward of a layer, as ``autograd`` calls the backend, on uninitialized tensors."""
    x, weight = torch.empty(case.M, case.K, dtype=case.dtype), torch.empty(case.N, case.K, dtype=case.dtype)
    lora_A, lora_B = torch.empty(case.R, case.K), torch.empty(case.N, case.R)
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
    if case.R > config.gated_rank(case.dtype):
        return
    whole = [gated.Side(torch.empty(case.N), torch.empty(case.M, case.R), True) for _ in range(3)]
    frozen = gated.Side(None, None, False)
    for activation in ("silu", "gelu", "gelu_tanh"):
        gated.gate_sums(e, f, dh, tuple(whole), activation, precision=triton_backend._precision(case.dtype))
    gated.gate_sums(e, f, dh, (whole[0], frozen, frozen), "silu", precision="ieee")


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


def compile_request(kernel, arguments: dict, arch) -> CompileRequest:
    """What Triton would compile for a launch with these arguments."""
    parameters = inspect.signature(kernel.fn).parameters
    signature, constexprs, align16, options = {}, {}, [], {}
    for name, value in arguments.items():
        if name not in parameters:
            options[name] = value
        elif parameters[name].annotation is tl.constexpr or value is None or (type(value) is int and value == 1):
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            align16 += [name] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            align16 += [name] if value % 16 == 0 else []
        else:
            signature[name] = "fp32"
    return CompileRequest(kernel, signature, constexprs, arch, align16, options)


def waits_first(kernel: str, usage: dict) -> bool:
    """Whether a program touches no memory before it waits for the end of the launch before its own."""
    return usage["early_stores"] == 0 and (usage["early_loads"] == 0 or kernel in READ_INPUTS_EARLY)


@pytest.mark.plain_empty
@pytest.mark.parametrize("arch", PROCESSORS, ids=str)
def test_every_launch_compiles_within_the_targets_limits(arch, launches, monkeypatch, pytestconfig):
    for module in (
        config,
        gated,
        gemm_of_v,
        low_rank,
        mixed,
        mixed_config,
        mixed_few,
        mixed_project,
        moments,
        norms,
    ):
        monkeypatch.setattr(module, "target", lambda index: (arch, PROCESSORS[arch]))
    monkeypatch.setattr(torch.version, "hip", "6.4" if isinstance(arch, str) else None)
    for cached in (config.gemm_config, mixed_config.mixed_many_config):
        cached.cache_clear()
    for case in CASES:
        run_layer(case)
        run_gate(case)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for M in (1, 16, 64, 200, 2048):
            run_mixed_batch(dtype, M, 16)
        for M in (300, 9000):
            run_mixed_batch(dtype, M, 64)
        run_mixed_batch(dtype, 64, 16, N=14336)
        run_mixed_batch(dtype, 40, 8, N=1024)
        for M in (16, 2048):
            run_mixed_batch(dtype, M, 200, factors=torch.float32)
            run_mixed_batch(dtype, M, 9, N=4093, K=4095)
    for N, K, R in ((17, 96, 2), (123, 264, 16), (4096, 4096, 1), (8192, 6144, 24)):
        run_reads(N, K, R)
    gram.add_gram(torch.empty(2, 4096 + 512, 512), 4096)  # which fewer processors leave in one part above
    for dtype, K in ((torch.bfloat16, 128), (torch.bfloat16, 4096), (torch.bfloat16, 16383), (torch.float32, 16384)):
        run_norm(dtype, K)
    for dtype, R, K in ((torch.bfloat16, 16, 320), (torch.float16, 64, 4), (torch.float32, 16, 1280)):
        run_weight_or_v(dtype, dtype, R, K)
        run_weight_or_v(torch.float32, dtype, R, K)
    for dtype, block in ((torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 4096)):
        for nested in (False, True):
            run_dequantization(dtype, block, nested)
    for cached in (config.gemm_config, mixed_config.mixed_many_config):
        cached.cache_clear()
    requests = {}
    for kernel, arguments in launches:
        request = compile_request(kernel, arguments, arch)
        requests.setdefault(repr((kernel, request.signature, request.constexprs, request.options)), request)
    launched = {request.kernel.__name__ for request in requests.values()}
    # what few tokens' parts are made and added by is for sm_90
    assert len(launched) == (24 if arch == 90 else 22), "not every kernel was launched"

    every = list(requests.values())
    compiled = every if arch == 90 or pytestconfig.getoption("every_variant") else some_of_each_kernel(every)
    assert {request.kernel.__name__ for request in compiled} == launched
    problems = []
    for request, usage in zip(compiled, cross_compile_all(compiled), strict=True):
        blocks = {k: v for k, v in (request.constexprs | request.options).items() if isinstance(v, int)}
        if isinstance(usage, CompileError):
            problems.append(f"{request.kernel.__name__} {blocks}: {usage}")
        elif usage["spill_bytes"] > TOLERATED_SPILL_BYTES or usage["shared_bytes"] > SHARED_MEMORY_LIMIT[arch]:
            problems.append(f"{request.kernel.__name__} {blocks}: {usage}")
        elif request.options.get("launch_pdl") and not waits_first(request.kernel.__name__, usage):
            problems.append(f"{request.kernel.__name__} {blocks} does not wait for the launch before: {usage}")
    assert not problems, f"{len(problems)} of {len(compiled)} variants:\n" + "\n".join(problems)
