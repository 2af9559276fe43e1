"""The test harness itself: bfloat16 in the interpreter, guard pages, NaN-filled memory, cross compilation, samples."""

import sys

import pytest
import torch
from helpers.cross_compile import ARCHS, SHARED_MEMORY_LIMIT, CompileError, CompileRequest, cross_compile_all
from helpers.guard_pages import faulted, guarded, run_isolated
from helpers.sample import sample

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

only_interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="about Triton's interpreter")


# --- bfloat16 -----------------------------------------------------------------------------------------------


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N, ROUNDING: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=offs < N)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, OP: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 16))
    if OP == "add":
        y = x + x
    elif OP == "scale":
        y = x * 0.5
    elif OP == "compare":
        y = tl.where(x > x, 1.0, 0.0)
    elif OP == "sum":
        y = x.to(tl.float32) + tl.sum(x, axis=0)
    else:
        y = x.to(tl.float32) + x
    tl.store(y_ptr + tl.arange(0, 16), y.to(tl.float32))


def _cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _cast_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), ROUNDING=rounding, BLOCK_SIZE=1024)
    return y


def _float32_of_all_kinds(device: str) -> torch.Tensor:
    """Random bit patterns (subnormals, infinities and NaN among them), and every tie between two bfloat16."""
    random = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(2**16, dtype=torch.int64) << 16 | 0x8000).sub(2**31).to(torch.int32)[::7]
    return torch.cat([random, ties]).view(torch.float32).to(device)


def test_cast_to_bf16_rounds_to_nearest_even(device, interpreter_bf16):
    x = _float32_of_all_kinds(device)
    torch.testing.assert_close(_cast(x, torch.bfloat16), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_cast_to_bf16_toward_zero(device, interpreter_bf16):
    x = _float32_of_all_kinds(device)
    x = x[x.isfinite()]
    truncated = (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    torch.testing.assert_close(_cast(x, torch.bfloat16, "rtz"), truncated, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_cast_from_bf16(dtype, device, interpreter_bf16):
    x = torch.linspace(-300, 300, 1001, device=device).bfloat16()
    torch.testing.assert_close(_cast(x, dtype), x.to(dtype), rtol=0, atol=0)


def test_dot_of_bf16(device, interpreter_bf16):
    a, b = (torch.randn(32, 32, device=device).bfloat16() for _ in range(2))
    c = torch.empty(32, 32, device=device)
    _dot_kernel[(1,)](a, b, c, SIZE=32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


@only_interpreted
@pytest.mark.parametrize("op", ["add", "scale", "compare", "sum"])
def test_other_bf16_arithmetic_raises(op, interpreter_bf16):
    with pytest.raises(triton.runtime.errors.InterpreterError, match="upcast to float32 first"):
        _arithmetic_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), torch.empty(16), OP=op)


def test_arithmetic_of_upcast_bf16(device, interpreter_bf16):
    y = torch.empty(16, device=device)
    _arithmetic_kernel[(1,)](torch.full((16,), 1.5, dtype=torch.bfloat16, device=device), y, OP="mixed")
    torch.testing.assert_close(y, torch.full_like(y, 3.0))


@only_interpreted
def test_a_launch_leaves_the_language_as_it_was(interpreter_bf16):
    """One that fails, too: what the interpreter puts in the place of its functions is for kernels alone."""
    before = {name: getattr(tl, name) for name in dir(tl)}
    x, y = torch.ones(16, dtype=torch.bfloat16), torch.empty(16)
    for op, result in (("mixed", 2.0), ("sum", None), ("mixed", 2.0)):
        if result is None:
            with pytest.raises(triton.runtime.errors.InterpreterError):
                _arithmetic_kernel[(1,)](x, y, OP=op)
        else:
            _arithmetic_kernel[(1,)](x, y.zero_(), OP=op)
            assert (y == result).all()
        assert {name: getattr(tl, name) for name in dir(tl)} == before


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["start", "end"])
def test_guarded_copies_shape_strides_and_values(at):
    x = torch.randn(7, 5, dtype=torch.float64)
    for source in (x, x.t(), x[::2, 1:4], x[:, :1].expand(7, 3), x[0, 0], x[:0], x.bfloat16()):
        copy = guarded(source, at)
        assert copy.shape == source.shape and copy.stride() == source.stride()
        assert torch.equal(copy, source)


@triton.jit
def _double_kernel(x_ptr, y_ptr, N, MASKED: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    offs = tl.arange(0, BLOCK_SIZE)
    mask = offs < (N if MASKED else BLOCK_SIZE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N, other=0.0) * 2, mask=mask)


def _overrun() -> None:
    x, y = guarded(torch.randn(13)), guarded(torch.zeros(13))
    _double_kernel[(1,)](x, y, 13, MASKED=True, BLOCK_SIZE=16)
    assert torch.equal(y, 2 * x)
    print("within bounds", flush=True)
    _double_kernel[(1,)](x, y, 13, MASKED=False, BLOCK_SIZE=16)


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_guard_page_catches_a_write_past_the_end():
    result = run_isolated(_overrun)
    assert result.stdout.decode().split("\n")[0] == "within bounds", result.stderr.decode()
    assert faulted(result), result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_empty_is_filled_with_nan(dtype, device):
    x = torch.zeros(3, dtype=dtype, device=device)
    fresh = [
        torch.empty(5, dtype=dtype, device=device),
        torch.empty(2, 3, dtype=dtype, device=device, requires_grad=True),
        torch.empty_like(x),
        torch.empty_strided((2, 2), (1, 2), dtype=dtype, device=device),
        x.new_empty(4),
        x.new_empty_strided((2, 2), (1, 2)),
    ]
    assert all(tensor.isnan().all() for tensor in fresh)
    assert torch.empty(3, dtype=torch.int32).dtype == torch.int32


@pytest.mark.plain_empty
def test_plain_empty_opts_out():
    assert torch.empty.__name__ == "empty" and type(torch.empty) is type(torch.zeros)


# --- cross compilation --------------------------------------------------------------------------------------


@triton.jit
def _squares(x):
    return tl.sum(x * x, axis=1)


@triton.jit
def _row_norm_kernel(x_ptr, y_ptr, M, K, stride_xm, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_K: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    acc = tl.zeros((BLOCK_SIZE_M,), tl.float32)
    for k in range(0, K, BLOCK_SIZE_K):
        offs_k = k + tl.arange(0, BLOCK_SIZE_K)
        mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
        acc += _squares(x.to(tl.float32))
    tl.store(y_ptr + offs_m, tl.sqrt(acc), mask=offs_m < M)


@triton.jit
def _descriptor_dot_kernel(a_desc, b_desc, c_ptr, K, SIZE: tl.constexpr, BLOCK_SIZE_K: tl.constexpr):
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, BLOCK_SIZE_K):
        acc += tl.dot(a_desc.load([0, k]), b_desc.load([0, k]).T)
    tl.store(c_ptr + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :], acc)


@triton.jit
def _too_small_dot_kernel(x_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, tl.dot(x, x))


def _compile_requests() -> dict[str, CompileRequest]:
    row_norm = {"x_ptr": "*bf16", "y_ptr": "*fp32", "M": "i32", "K": "i32", "stride_xm": "i32"}
    descriptors = {"a_desc": "tensordesc<bf16[64, 64]>", "b_desc": "tensordesc<bf16[64, 64]>"}
    descriptor_dot = descriptors | {"c_ptr": "*fp32", "K": "i32"}
    dot_sizes = {"SIZE": 64, "BLOCK_SIZE_K": 64}
    requests = {
        "rejected": CompileRequest(_too_small_dot_kernel, {"x_ptr": "*fp32"}, {"SIZE": 4}, 90),
        # 16 x 1024 values in the registers of one warp: 512 a thread.
        "spilling": CompileRequest(
            _row_norm_kernel,
            row_norm,
            {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_K": 1024},
            90,
            options={"num_warps": 1},
        ),
        "misnamed": CompileRequest(_row_norm_kernel, row_norm, {"BLOCK_M": 16, "BLOCK_SIZE_K": 128}, 90),
    }
    for arch in ARCHS:
        requests[f"row_norm-{arch}"] = CompileRequest(
            _row_norm_kernel,
            row_norm,
            {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_K": 128},
            arch,
            align16=("x_ptr", "y_ptr", "K", "stride_xm"),
            options={"num_warps": 4},
        )
        requests[f"descriptor_dot-{arch}"] = CompileRequest(_descriptor_dot_kernel, descriptor_dot, dot_sizes, arch)
    return requests


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict | CompileError]:
    requests = _compile_requests()
    return dict(zip(requests, cross_compile_all(list(requests.values())), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["row_norm", "descriptor_dot"])
def test_cross_compile_reaches_every_architecture(kernel, arch, compiled):
    usage = compiled[f"{kernel}-{arch}"]
    assert not isinstance(usage, CompileError), usage
    assert usage["registers"] > 0 and usage["spill_bytes"] == 0
    assert 0 < usage["shared_bytes"] <= SHARED_MEMORY_LIMIT[arch]


def test_cross_compile_reports_spills_and_rejections(compiled):
    assert compiled["spilling"]["stack_bytes"] > 0 and compiled["spilling"]["spill_bytes"] > 0
    assert "Input shapes should have" in str(compiled["rejected"])
    assert "BLOCK_M" in str(compiled["misnamed"])


def test_cross_compile_wants_an_importable_kernel():
    @triton.jit
    def local_kernel(x_ptr):
        pass

    with pytest.raises(ValueError, match="top of an importable module"):
        cross_compile_all([CompileRequest(local_kernel, {"x_ptr": "*fp32"}, {}, 90)])


# --- samples ------------------------------------------------------------------------------------------------


class Item:
    """A collected test, as far as the sample looks at it."""

    def __init__(self, test, case=None, n=None):
        self.name = test if case is None else f"{test}[{case}]"
        self.nodeid, self.n = f"tests/test_it.py::{self.name}", n

    def get_closest_marker(self, name):
        assert name == "sampled"
        return None if self.n is None else pytest.mark.sampled(self.n).mark


def test_a_sample_has_a_share_of_each_test_and_all_of_those_that_are_not_sampled():
    plain = [Item("test_plain", case) for case in range(40)] + [Item("test_alone")]
    many, few = [Item("test_many", case, 4) for case in range(400)], [Item("test_few", "a", 10**9)]
    chosen = sample(plain + many + few)
    assert chosen.issuperset(plain + few) and 60 <= len(chosen.intersection(many)) <= 140
    assert sample(plain + many + few) == chosen  # the same cases each time
