"""4-bit weights decoded by the kernels: the values of bitsandbytes, bit for bit."""

import pytest
import torch
from helpers.cases import HALVES, NAMES, require

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

from bitsandbytes import functional

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


@pytest.mark.slow
def test_largest_block(device):
    stored = quantize((2, 8192), torch.float32, "nf4", True, 4096, device)
    assert torch.equal(stored.dense(backend="triton"), stored.dense(backend="torch"))
