"""Bad input raises ValueError or TypeError with the argument's name, what was expected and what came."""

import pytest
import torch
from helpers.cases import Case
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from bora_kernels import FusedBoraLinear, FusedDoraLinear, bora_linear

M, N, K, R = 3, 6, 5, 2


def arguments(**changed):
    return {**Case(M, N, K, R).inputs("cpu"), "scaling": 0.5, "backend": "torch", **changed}


# ---- the function ----

ONES = torch.ones
FUNCTION_ERRORS = {
    "x-shape": ({"x": ONES(M, N)}, ValueError, r"x must be \[..., 5\] for weight \[6, 5\], got \[3, 6\]"),
    "x-scalar": ({"x": ONES(())}, ValueError, r"x must be \[..., 5\] .* got \[\]"),
    "x-dtype": ({"x": ONES(M, K).half()}, TypeError, "x must have weight's dtype torch.float32 .*float16"),
    "x-integer": (
        {"x": ONES(M, K).long()},
        TypeError,
        "x must be float32, bfloat16, .* got torch.int64",
    ),
    "x-list": ({"x": [[1.0] * K]}, TypeError, "x must be a Tensor, got list"),
    "x-device": ({"x": ONES(M, K, device="meta")}, ValueError, "weight must be on x's device meta, got cpu"),
    "weight-shape": (
        {"weight": ONES(N)},
        ValueError,
        r"weight must be \[out_features, in_features\], got .*\[6\]",
    ),
    "weight-empty": (
        {"weight": ONES(0, K)},
        ValueError,
        r"weight must have at least one row .* got shape \[0, 5\]",
    ),
    "weight-none": ({"weight": None}, TypeError, "weight must be a Tensor, got NoneType"),
    "weight-uint8": (
        {"weight": ONES(N, K, dtype=torch.uint8)},
        TypeError,
        r"weight must be float32, bfloat16, .* got torch.uint8 \(Tensor: a quantized weight must be",
    ),
    "weight-trainable": (
        {"weight": ONES(N, K).requires_grad_()},
        ValueError,
        r"weight must be frozen \(requires_grad=False\)",
    ),
    "lora_A-shape": ({"lora_A": ONES(R, N)}, ValueError, r"lora_A must be \[2, 5\], got \[2, 6\]"),
    "lora_A-dim": ({"lora_A": ONES(K)}, ValueError, r"lora_A must be \[rank, 5\] with rank >= 1, got \[5\]"),
    "rank-0": (
        {"lora_A": ONES(0, K)},
        ValueError,
        r"lora_A must be \[rank, 5\] with rank >= 1, got \[0, 5\]",
    ),
    "lora_A-none": ({"lora_A": None}, ValueError, "lora_A must be .* got NoneType"),
    "lora_A-dtype": ({"lora_A": ONES(R, K).int()}, TypeError, "lora_A must be float32, bfloat16, .* got torch.int32"),
    "lora_B-shape": ({"lora_B": ONES(R, N)}, ValueError, r"lora_B must be \[6, 2\], got \[2, 6\]"),
    "lora_B-none": ({"lora_B": None}, ValueError, r"lora_B must be \[6, 2\], got NoneType"),
    "row-shape": ({"magnitude_row": ONES(K)}, ValueError, r"magnitude_row must be \[6\], got \[5\]"),
    "row-2d": ({"magnitude_row": ONES(1, N)}, ValueError, r"magnitude_row must be \[6\], got \[1, 6\]"),
    "col-shape": ({"magnitude_col": ONES(N)}, ValueError, r"magnitude_col must be \[5\], got \[6\]"),
    "bias-shape": ({"bias": ONES(K)}, ValueError, r"bias must be \[6\], got \[5\]"),
    "bias-dtype": (
        {"bias": ONES(N).bool()},
        TypeError,
        "bias must be float32, bfloat16, float16 or float64, got torch.bool",
    ),
    "scaling-nan": ({"scaling": float("nan")}, ValueError, "scaling must be finite, got nan"),
    "scaling-inf": ({"scaling": float("inf")}, ValueError, "scaling must be finite, got inf"),
    "norm_order": (
        {"norm_order": "rows"},
        ValueError,
        "norm_order must be one of row_col, col_row, got 'rows'",
    ),
    "dropout_p-1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout_p-negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    "dropout_p-nan": ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    "eps-0": ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    "eps-inf": ({"eps": float("inf")}, ValueError, "eps must be positive and finite, got inf"),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of triton, torch, reference or None, got 'cuda'",
    ),
}
for _name in ("weight", "lora_A", "lora_B", "magnitude_row", "magnitude_col", "bias"):
    _elsewhere = {_name: arguments()[_name].to("meta")}
    FUNCTION_ERRORS[f"{_name}-device"] = (
        _elsewhere,
        ValueError,
        f"{_name} must be on x's device cpu, got meta",
    )


@pytest.mark.parametrize("changed, error, message", FUNCTION_ERRORS.values(), ids=FUNCTION_ERRORS)
def test_function_names_the_bad_argument(changed, error, message):
    with pytest.raises(error, match=message):
        bora_linear(**arguments(**changed))


def test_function_accepts_what_the_errors_are_about():
    y = bora_linear(**arguments())
    assert y.shape == (M, N) and y.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):  # the one place where x may have another dtype than the weight
        assert bora_linear(**arguments(x=ONES(M, K).half())).dtype == torch.bfloat16


# ---- the modules ----


class Wrapped(torch.Tensor):
    """A weight that is a Tensor to the eye and keeps its data elsewhere, as quantized and sharded ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Wrapped(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.detach.default:  # what nn.Parameter calls
            raise NotImplementedError(function)
        return return_and_correct_aliasing(function, args, kwargs or {}, Wrapped(args[0].inner))


def linear_with(weight):
    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return linear


MODULE_ERRORS = {
    "r-0": (nn.Linear(K, N), {"r": 0}, ValueError, "r must be an integer of at least 1, got 0"),
    "r-float": (nn.Linear(K, N), {"r": 2.0}, ValueError, "r must be an integer of at least 1, got 2.0"),
    "r-bool": (nn.Linear(K, N), {"r": True}, ValueError, "r must be an integer of at least 1, got True"),
    "alpha-string": (nn.Linear(K, N), {"alpha": "8"}, TypeError, "alpha must be a number, got '8'"),
    "dropout-none": (nn.Linear(K, N), {"dropout": None}, TypeError, "dropout must be a number, got None"),
    "alpha": (nn.Linear(K, N), {"alpha": float("nan")}, ValueError, "scaling must be finite, got nan"),
    "dropout": (nn.Linear(K, N), {"dropout": 1.5}, ValueError, r"dropout_p must be in \[0, 1\), got 1.5"),
    "norm_order": (
        nn.Linear(K, N),
        {"norm_order": None},
        ValueError,
        "norm_order must be one of .* got None",
    ),
    "adapter_dtype": (
        nn.Linear(K, N),
        {"adapter_dtype": torch.int8},
        TypeError,
        "adapter_dtype must be a floating-point dtype, got torch.int8",
    ),
    "quantized": (
        linear_with(torch.ones(N * K // 2, 1, dtype=torch.uint8)),
        {},
        TypeError,
        "linear.weight must be float32, .* got torch.uint8 .*quantized weight must be dequantized",
    ),
    "packed": (
        linear_with(torch.ones(N * K // 2, 1)),
        {},
        ValueError,
        r"linear.weight must be \[6, 5\], got \[15, 1\] \(packed or sharded\)",
    ),
    "subclass": (
        linear_with(Wrapped(torch.ones(N, K))),
        {},
        TypeError,
        r"linear.weight must be a plain dense tensor, got a Wrapped \(sharded or quantized\)",
    ),
}


@pytest.mark.parametrize("linear, options, error, message", MODULE_ERRORS.values(), ids=MODULE_ERRORS)
@pytest.mark.parametrize("cls", [FusedBoraLinear, FusedDoraLinear])
def test_from_linear_refuses_and_changes_nothing(cls, linear, options, error, message):
    weight, bias = linear.weight, linear.bias
    before = [(p.requires_grad, p._version) for p in linear.parameters()]
    with pytest.raises(error, match=message):
        cls.from_linear(linear, **options)
    assert [id(p) for p in linear.parameters()] == [id(weight), id(bias)]
    assert [(p.requires_grad, p._version) for p in linear.parameters()] == before


def test_from_linear_wants_a_linear():
    with pytest.raises(TypeError, match="linear must be a torch.nn.Linear, got Conv2d"):
        FusedBoraLinear.from_linear(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("sizes, message", [((0, N), "in_features .* got 0"), ((K, 2.5), "out_features .* got 2.5")])
def test_constructor_names_the_bad_size(sizes, message):
    with pytest.raises(ValueError, match=message):
        FusedBoraLinear(*sizes)


def test_a_weight_unfrozen_later_is_refused():
    module = FusedBoraLinear(K, N, r=R)
    module.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight must be frozen"):
        module(ONES(M, K))


def test_a_weight_that_is_not_frozen_yet_is_evaluated_but_not_trained():
    changed = arguments(weight=ONES(N, K).requires_grad_())
    with torch.no_grad():
        assert bora_linear(**changed).isfinite().all()
    with pytest.raises(ValueError, match="weight must be frozen"):
        bora_linear(**changed)
