"""Adapters for a bank, and what a bank holds."""

from __future__ import annotations

import torch
from helpers.accuracy import assert_equal
from helpers.cases import Case

from bora_kernels import AdapterBank
from bora_kernels.serving import Adapter

N, K = 23, 37


def tensors(seed: int, rank: int = 2, member: str = "bora", device: str = "cpu") -> Adapter:
    inputs = Case(1, N, K, rank, member=member, seed=seed).inputs(device)
    return Adapter(*(inputs[name] for name in Adapter._fields))


def state(bank: AdapterBank) -> tuple:
    return bank.names, [t.clone() for t in bank.slots], [t.data_ptr() for t in bank.slots]


def assert_same(before: tuple, after: tuple) -> None:
    assert before[0] == after[0] and before[2] == after[2]
    assert_equal(before[1], after[1])


def linear_of(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device=weight.device)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear
