"""Linear layers of every quantized kind, as their libraries make them, and adapted ones over them."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import Case
from torch import Tensor, nn

from bora_kernels import FusedBoraLinear

BF16 = torch.bfloat16
FOUR_BIT = ("nf4", "nf4-nested", "fp4", "fp4-nested")
SCALED = ("int8", "torchao-int8", "torchao-int8-groups", "torchao-float8")
kinds = pytest.mark.parametrize("kind", [*FOUR_BIT, *SCALED])


def quantized_linear(kind: str, weight: Tensor, bias: Tensor | None = None, **options) -> nn.Linear:
    """A frozen layer with these values, quantized on the weight's device; skips where the library is missing."""
    if kind in FOUR_BIT or kind == "int8":
        return _bitsandbytes(kind, weight, bias, options)
    pytest.importorskip("torchao", reason="needs torchao")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerGroup, quantize_

    linear = dense_linear(weight, bias)
    config = {
        "torchao-int8": Int8WeightOnlyConfig,
        "torchao-int8-groups": lambda: Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "torchao-float8": Float8WeightOnlyConfig,
    }[kind]
    quantize_(linear, config())
    return linear


def dense_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


def _bitsandbytes(kind: str, weight: Tensor, bias: Tensor | None, options: dict) -> nn.Linear:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    N, K = weight.shape
    if kind == "int8":
        linear = bnb.nn.Linear8bitLt(K, N, bias=bias is not None, has_fp16_weights=False, **options)
        linear.weight = bnb.nn.Int8Params(weight.cpu().clone(), requires_grad=False)
    else:
        quant_type, _, nested = kind.partition("-")
        linear = bnb.nn.Linear4bit(K, N, bias=bias is not None, **options)
        linear.weight = bnb.nn.Params4bit(
            weight.cpu().clone(), quant_type=quant_type, compress_statistics=bool(nested), module=linear,
            quant_storage=options.get("quant_storage", torch.uint8),
        )  # fmt: skip
    if bias is not None:
        linear.bias = nn.Parameter(bias.cpu().clone(), requires_grad=False)
    return linear.to(weight.device)


def make_layer(kind, device, seed=0, **options):
    """A bfloat16 layer [64, 128] after some training, over a base of its own."""
    inputs = Case(N=64, K=128, R=4, dtype=BF16, seed=seed).inputs(device)
    layer = FusedBoraLinear.from_linear(
        quantized_linear(kind, inputs["weight"], inputs["bias"]), r=4, alpha=2, **options
    )
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(layer, name).copy_(inputs[name])
        layer.magnitude_row.mul_(1 + 0.1 * torch.randn(64, device=device))
    return layer


def tokens(device, dtype=BF16, K=128):
    return torch.randn(5, K, device=device, dtype=dtype, requires_grad=True)


def results(call, x, layer=None):
    """The output and all gradients; ``layer`` is what has the parameters, unless it is called itself."""
    trained = [x, *(p for p in (layer or call).parameters() if p.requires_grad)]
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), trained)]


def parts(layer):
    return [part.clone() for part in layer.weight.stored().tensors]


def all_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
