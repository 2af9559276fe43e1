"""The one accuracy rule: an output may err at most twice as much as plain PyTorch does in the same dtypes.

    ‖out − exact‖  ≤  2·(1 + 3/√samples)·‖plain − exact‖ + floor·scale

``exact`` is the reference in float64 on the same values, ``plain`` the reference in the dtypes of the case.
Both errors are sums of random roundings. The smallest intermediate has ``samples`` of them, so the ratio is
known to about 1/√samples, and 3/√samples is allowed for it. The floor, a few units in the last place of the
dtype that sums are kept in, is for what plain PyTorch happens to get exactly right; ``scale`` is ‖exact‖ or,
where exact is what is left of terms that cancel, the norm of those terms. A NaN or an infinity never passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor] | Iterable[Tensor]

FLOOR = 5e-7  # four units in the last place of float32
FLOOR_FLOAT64 = 1e-12  # and what "exact" itself may err where a sum cancels
_WORST = 5


def assert_accurate(
    actual: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    *,
    samples: int,
    terms: dict[str, Tensor] | None = None,
    floor: float = FLOOR,
) -> None:
    """Hold every tensor of ``actual`` to the rule; all the failures go into one AssertionError."""
    assert actual.keys() == plain.keys() == exact.keys(), (list(actual), list(plain), list(exact))
    reports = []
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype, f"{name} is {value.dtype}, plain is {plain[name].dtype}"
        assert value.shape == exact[name].shape, f"{name} is {value.shape}, exact is {exact[name].shape}"
        scale = max(_norm(t[name]) for t in (exact, terms or exact))
        report = _mismatch(name, value, plain[name], exact[name], samples, scale or 1.0, floor)
        reports += [report] if report else []
    assert not reports, "\n" + "\n".join(reports)


def as_one(layers: Iterable[tuple[dict[str, Tensor], ...]]) -> tuple[dict[str, Tensor], ...]:
    """Each result of several layers as one tensor, of which every layer has as much to say.

    A layer is four dicts: actual, plain, exact and terms. Where one number is nearly all of a result its error is one
    rounding, and plain PyTorch's is close to 0 now and then: here the layers are the samples that the rule speaks of.
    """
    stacks: tuple[dict[str, list[Tensor]], ...] = ({}, {}, {}, {})
    for results in layers:
        for name in results[0]:
            scale = max(result[name].norm() for result in results[2:])
            for stack, result in zip(stacks, results, strict=True):
                wide = torch.promote_types(result[name].dtype, torch.float32)
                stack.setdefault(name, []).append((result[name].to(wide) / scale).flatten())
    return tuple({name: torch.cat(parts) for name, parts in stack.items()} for stack in stacks)


def assert_equal(actual: Tensors, expected: Tensors) -> None:
    """The same values and dtypes, NaN nowhere; the error names the first tensor that differs, and by how much."""
    one, other = (dict(t if isinstance(t, Mapping) else enumerate(t)) for t in (actual, expected))
    assert one.keys() == other.keys(), (list(one), list(other))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_finite(actual: dict[str, Tensor], plain: dict[str, Tensor], *, exactly: bool = True) -> None:
    """Each tensor is finite exactly where plain PyTorch's is; or else, at most there."""
    for name, value in actual.items():
        finite, expected = value.isfinite(), plain[name].isfinite()
        wrong = finite != expected if exactly else finite & ~expected
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are finite in only one of the two; "
            f"first at {wrong.nonzero()[0].tolist()}: {value[wrong][0]}, plain {plain[name][wrong][0]}"
        )


def _mismatch(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, samples: int, scale: float, floor: float
) -> str | None:
    """What is wrong with one tensor, or None."""
    difference = actual.double() - exact
    error, plain_error = _norm(difference), _norm(plain.double() - exact)
    bound = 2 * (1 + 3 / math.sqrt(max(1, samples))) * plain_error
    bound += (FLOOR_FLOAT64 if actual.dtype == torch.float64 else floor) * scale
    if error <= bound < math.inf:  # false for NaN, in actual or plain
        return None
    lines = [
        f"{name} {list(actual.shape)} {actual.dtype}: error {error / scale:.2e} exceeds {bound / scale:.2e}"
        f" (plain PyTorch {plain_error / scale:.2e}), relative to {scale:.3e}"
    ]
    worst = difference.abs().nan_to_num(nan=math.inf).flatten().topk(min(_WORST, difference.numel())).indices
    for flat in worst.tolist():
        index = [int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape)]
        values = (t.flatten()[flat].item() for t in (actual, exact, plain))
        lines.append("    at {}: {:.6g}, exact {:.6g}, plain {:.6g}".format(index, *values))
    return "\n".join(lines)


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()
