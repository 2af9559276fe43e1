"""Every kernel, in every configuration that a launch would choose, compiles for GPUs that this machine does not have.

Compilers take half a second for each: as few are compiled as have every tile and every value of every argument. With
--every-variant all are, as is right when kernels change.

Launches are recorded, not made up: ``fused`` runs on CPU tensors with the kernels replaced by recorders, so that what
is compiled is what a real launch on the target would compile.
"""

from __future__ import annotations

import inspect

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
from helpers.recorded_launches import (
    KERNELS,
    MODULES,
    TYPES,
    Case,
    record,
    run_dequantization,
    run_gate,
    run_layer,
    run_mixed_batch,
    run_norm,
    run_reads,
    run_shared_sums,
    run_sums,
    run_weight_or_v,
)
from triton.tools.tensor_descriptor import TensorDescriptor

from bora_kernels.kernels import config, gram, mixed_config
from bora_kernels.replay.compiled import unspecialized

# ptxas spills a register or two to raise occupancy even where a thread has 40 of its 255. Of what Triton 3.6 makes,
# four finishing kernels for more than 64 ranks spill more, up to 96 bytes on sm_80
TOLERATED_SPILL_BYTES = 32 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 96
# of launches that may begin while the one before runs: these read a stage's inputs before they wait for its end
READ_INPUTS_EARLY = {"_linear_few_kernel", "_parts_kernel", "_add_parts_kernel"}
ONLY_ON_90 = {"_parts_kernel", "_add_parts_kernel"}  # a product over few tokens in parts
ONLY_ON_90 |= {"_project_wide_kernel", "_reduce_wide_kernel", "_terms_kernel"}  # passes at larger ranks
ONLY_ON_90 |= {  # norms at larger ranks
    "_factor_terms_kernel", "_gram_of_terms_kernel", "_moments_of_terms_kernel", "_products_kernel",
}  # fmt: skip
PROCESSORS = {80: 108, 90: 132, 100: 148, "gfx942": 304}


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
MANY_RANKS = (  # which Hopper GPUs have kernels of their own for; elsewhere they only take longer to compile
    Case(torch.bfloat16, 24, M=2048),
    Case(torch.bfloat16, 128, M=2048, half_adapter=True),
    Case(torch.float16, 200, M=1001, N=4112, K=3600),
)


def compile_request(kernel, arguments: dict, arch) -> CompileRequest:
    """What Triton would compile for a launch with these arguments."""
    parameters, plain = inspect.signature(kernel.fn).parameters, unspecialized(kernel)
    signature, constexprs, align16, options = {}, {}, [], {}
    for name, value in arguments.items():
        if name not in parameters:
            options[name] = value
        elif (
            parameters[name].annotation is tl.constexpr
            or value is None
            or (type(value) is int and value == 1 and name not in plain)
        ):
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            align16 += [name] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            align16 += [name] if value % 16 == 0 and name not in plain else []
        else:
            signature[name] = "fp32"
    return CompileRequest(kernel, signature, constexprs, arch, align16, options)


@pytest.fixture
def launches(monkeypatch):
    return record(monkeypatch)


def waits_first(kernel: str, usage: dict) -> bool:
    """Whether a program touches no memory before it waits for the end of the launch before its own."""
    return usage["early_stores"] == 0 and (usage["early_loads"] == 0 or kernel in READ_INPUTS_EARLY)


@pytest.mark.plain_empty
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[pytest.mark.slow] * (arch == 100)) for arch in PROCESSORS], ids=str
)
def test_every_launch_compiles_within_the_targets_limits(arch, launches, monkeypatch, pytestconfig):
    for module in MODULES:
        if hasattr(module, "target"):
            monkeypatch.setattr(module, "target", lambda index: (arch, PROCESSORS[arch]))
    monkeypatch.setattr(torch.version, "hip", "6.4" if isinstance(arch, str) else None)
    for cached in (config.gemm_config, mixed_config.mixed_many_config):
        cached.cache_clear()
    every_variant = pytestconfig.getoption("every_variant")
    many_ranks = arch == 90 or every_variant
    for case in (*CASES, *(MANY_RANKS if many_ranks else ())):
        run_layer(case)
        run_gate(case)
        run_shared_sums(case)
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
    for R in (65, 300) if many_ranks else ():
        run_sums(4096, 4096, R)
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
    assert launched == KERNELS - (set() if arch == 90 else ONLY_ON_90)

    every = list(requests.values())
    compiled = every if every_variant else some_of_each_kernel(every)
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
