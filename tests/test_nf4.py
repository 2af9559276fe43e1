"""4-bit weights decoded by the kernels: the values of bitsandbytes, bit for bit."""

import pytest
import torch
from cases import HALVES, NAMES, require

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

from bitsandbytes import functional
from cross_compile import SHARED_MEMORY_LIMIT, CompileRequest, cross_compile_all
from nf4_tile import tile_kernel

from bora_kernels.quantized import Layout, Quantized

dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=NAMES.get)
codes = pytest.mark.parametrize("code", ["nf4", "fp4"])
nestings = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


def quantize(shape, dtype, code, nested, block, device):
    weight = torch.randn(shape, device=device).to(dtype)
    weight.view(-1)[:: weight.numel() // 50 or 1] *= 20  # blocks of very different absmax
    packed, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=code)
    parts = (packed, state.code, state.absmax)
    parts += (state.state2.absmax, state.state2.code, state.offset) if nested else ()
    return Quantized(Layout(code, shape, dtype, (block, state.state2.blocksize) if nested else (block,)), parts)


SHAPES = [((64, 64), 64), ((37, 96), 64), ((5, 130), 32), ((40, 128), 128), ((9, 512), 1024), ((1, 2), 64)]


@codes
@nestings
@dtypes
@pytest.mark.parametrize("shape, block", SHAPES, ids=lambda value: str(value).replace(" ", ""))
def test_dequantize_is_bitsandbytes(code, nested, dtype, shape, block, device):
    require("triton", dtype)
    stored = quantize(shape, dtype, code, nested, block, device)
    assert torch.equal(stored.dense(backend="triton"), stored.dense(backend="torch"))


def test_largest_block(device):
    stored = quantize((2, 8192), torch.float32, "nf4", True, 4096, device)
    assert torch.equal(stored.dense(backend="triton"), stored.dense(backend="torch"))


@nestings
@dtypes
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_tiles_are_those_of_the_dense_weight(nested, dtype, transposed, device):
    """In both directions, with tiles that overrun, rows that start within a byte, and NaN in nothing."""
    require("triton", dtype)
    N, K = 50, 75
    stored = quantize((N, K), dtype, "nf4", nested, 64, device)
    dense = stored.dense(backend="torch")
    expected, strides = (dense.T, (1, K)) if transposed else (dense, (K, 1))
    out = torch.empty(expected.shape, dtype=dtype, device=device)
    arguments = (*stored.parts, None, None, None)[:6]
    tile_kernel[(2, 2)](
        *arguments, out, *out.shape, *strides,
        BLOCK=64, NESTED_BLOCK=256 if nested else 0, BLOCK_SIZE_I=64, BLOCK_SIZE_J=64,
    )  # fmt: skip
    # where the compiler fuses the product and the sum of a nested absmax, its last bit may differ, and the value's
    rounding = 0 if device == "cpu" or not nested else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=rounding, atol=0)


def test_tiles_compile_for_every_target():
    requests = []
    for arch in (80, 90, 100, "gfx942"):
        for nested_block, out in ((0, "bf16"), (256, "bf16"), (256, "fp32")):
            nesting = ("nested_absmax_ptr", "nested_code_ptr", "offset_ptr")
            signature = {"packed_ptr": "*u8", "code_ptr": "*fp32", "absmax_ptr": "*u8" if nested_block else "*fp32"}
            signature |= {"out_ptr": f"*{out}", "I": "i32", "J": "i32", "stride_i": "i32"}
            constexprs = {"stride_j": 1, "BLOCK": 64, "NESTED_BLOCK": nested_block}
            constexprs |= {"BLOCK_SIZE_I": 32, "BLOCK_SIZE_J": 64}
            if nested_block:
                signature |= dict.fromkeys(nesting, "*fp32")
            else:
                constexprs |= dict.fromkeys(nesting)
            requests.append(CompileRequest(tile_kernel, signature, constexprs, arch, ("J", "stride_i", "out_ptr")))
    for request, usage in zip(requests, cross_compile_all(requests), strict=True):
        assert isinstance(usage, dict), f"{request.arch} {request.constexprs}: {usage}"
        assert usage["spill_bytes"] == 0 and usage["shared_bytes"] <= SHARED_MEMORY_LIMIT[request.arch]
