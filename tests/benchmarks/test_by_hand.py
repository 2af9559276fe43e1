"""LoRA fused by hand, the strongest peer: right, and made of matrix products alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.adapting import install
from benchmarks.by_hand import LoraByHand
from benchmarks.cases import Case
from benchmarks.models import Workload
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.verify import References, WrongResult, make_step, named
from bora_kernels import reference

BY_HAND = [provider for provider in PROVIDERS if provider.name in ("lora-by-hand", "lora-by-hand-half")]


def layer(out_features: int, in_features: int, rank: int, dtype: torch.dtype = torch.float64) -> LoraByHand:
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype).requires_grad_(False)
    made = LoraByHand(linear, rank, 0.7, dtype)
    for factor in (made.lora_A, made.lora_B):
        nn.init.normal_(factor)
    return made


@pytest.mark.parametrize("batch", [(), (3,), (2, 5)], ids=str)
def test_output_and_gradients_are_the_formulas(batch):
    made = layer(11, 7, 3)
    x, dy = torch.randn(*batch, 7, dtype=torch.float64, requires_grad=True), torch.randn(*batch, 11).double()
    inputs = (x, made.lora_A, made.lora_B)
    y = made(x)
    expected = reference.bora_linear_ref(x, made.weight, made.lora_A, made.lora_B, None, None, scaling=0.7)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy))


class Counting(TorchDispatchMode):
    """Counts operators that compute; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


def test_nothing_runs_but_products():
    """Two of the frozen layer and six of the adapter's."""
    made = layer(16, 8, 4, torch.bfloat16)
    x, dy = (torch.randn(6, size, dtype=torch.bfloat16) for size in (8, 16))
    with Counting() as counting:
        torch.autograd.grad(made(x.requires_grad_()), (x, made.lora_A, made.lora_B), dy)
    products = {name: times for name, times in counting.seen.items() if name not in ("detach", "_unsafe_view")}
    assert products == {"mm": 4, "addmm_": 2, "addmm": 2}


def test_a_bias_is_added():
    linear = nn.Linear(5, 6, dtype=torch.float64).requires_grad_(False)
    made = LoraByHand(linear, 2, 1.5, torch.float64)
    for factor in (made.lora_A, made.lora_B):
        nn.init.normal_(factor)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(made(x), linear(x) + 1.5 * x @ made.lora_A.T @ made.lora_B.T)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", BY_HAND, ids=lambda provider: provider.name)
def test_as_a_provider(provider: Provider, dtype: str):
    """Adapts a layer and a model, shares their weights, and passes the check that its time depends on."""
    for case in (Case("layer", "step", "48x64", 1, 33, 8, dtype), Case("model", "step", "tiny", 1, 8, 4, dtype)):
        if not provider.runs(case):
            assert (provider.name, dtype) == ("lora-by-hand-half", "fp32")
            continue
        workload = Workload(case, torch.device("cpu"))
        root = workload.copy(workload.root, share=True)
        adapters = install(provider.adapt, root, workload, case.rank, provider.adapter_dtype(case))
        assert all(adapter["lora_A"].dtype == provider.adapter_dtype(case) for adapter in adapters)
        workload.set_mode(root, training=True, checkpointing=False)
        step = make_step(workload.callable(root), workload.x.requires_grad_(), workload.dy, adapters, "step")
        references = References(workload, case.rank)
        result = named(step(), adapters)
        assert references.check(result, provider, provider.adapter_dtype(case)) <= 8
        result["d_lora_B"] = [1.5 * gradient for gradient in result["d_lora_B"]]
        with pytest.raises(WrongResult, match="d_lora_B is off"):
            references.check(result, provider, provider.adapter_dtype(case))
