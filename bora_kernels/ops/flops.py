"""How many floating-point operations the operators stand for, for ``torch.utils.flop_counter``.

As there, a product of matrices [m, k] and [k, n] counts 2·m·k·n and nothing else counts. Counted are the products of
equations (1) to (11) of ``torch_backend``; the parts that a backend splits an operand into, and what it tells cancelled
lines by, are its own affair.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from .. import _private
from ..contract import Members, Needs, Options


def forward_flops(
    x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, bias, dropout, *rest: Any, **_: Any
) -> int:  # fmt: skip
    """Of the operator ``forward``, from its tensors' shapes."""
    (M, K), (N, R) = x, lora_B
    norms = 2 * N * K * R if flat_scales is None and any((magnitude_row, magnitude_col)) else 0  # V
    return 2 * M * N * K + 2 * M * R * (K + N) + norms  # (2) and (1)


def backward_flops(
    dy, x, weight, lora_A, lora_B, magnitude_row, magnitude_col, flat_scales, product, u, dropout, *rest: Any, **_: Any
) -> int:  # fmt: skip
    """Of the operator ``backward``, from its tensors' shapes."""
    (M, N), (R, K) = dy, lora_A
    members = Members(magnitude_row is not None, magnitude_col is not None)
    options, needs = Options(*rest[:6]), Needs(*rest[6])
    flops = 2 * M * N * R  # (3)
    paths = needs.norm_paths(members, options)
    if needs.x or needs.sums(members, paths)[1]:
        flops += 2 * M * N * K + 2 * M * R * K  # (4)
    flops += 2 * M * N * R * needs.lora_B + 2 * M * R * K * needs.lora_A  # (6)
    if paths:
        flops += 2 * N * K * R * 3  # V, and its gradient's products with both factors: (8) to (11)
    return flops


def teach_counters() -> None:
    """Hand the formulas to PyTorch's table and to the counters that are open, which copied it when they were made.

    Not at import: the counter's module would import Triton.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    formulas = {torch.ops.bora_kernels.forward: forward_flops, torch.ops.bora_kernels.backward: backward_flops}
    new = [operator for operator in formulas if operator not in module.flop_registry]
    for operator in new:
        module.register_flop_formula(operator)(formulas[operator])
    for mode in _private.modes():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for operator in formulas:
                counter.flop_registry.setdefault(operator, module.flop_registry[operator])
