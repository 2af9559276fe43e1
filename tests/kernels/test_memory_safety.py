"""No kernel reads or writes outside its tensors: every one of them lies against a protected page."""

import importlib
import pkgutil
import sys
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from helpers.cases import Case, run
from helpers.guard_pages import faulted, guarded, run_isolated
from helpers.interpreter import interpreter_problem

pytest.importorskip("triton")

BF16 = torch.bfloat16
ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
CASES = [
    (Case(17, 37, 53, 3, dtype=BF16), {}),
    (Case(17, 53, 37, 19, order="col_row"), {"dropout_p": 0.25, "training": True}),
    (Case(33, 52, 36, 3, order="col_row", dtype=torch.float16), {}),  # rows of 8 bytes: too narrow for 16
    (Case(70, 40, 88, 3), {"detach_norm": True}),  # rows of 16 bytes: tensor descriptors
    (Case(1, 37, 53, 1, member="dora", bias=False), {}),
    (Case(3, 37, 300, 70), {}),  # more ranks than one tile has
    (Case(17, 40, 72, 70, dtype=BF16), {}),  # and in half precision, aligned
    (Case(17, 140, 20, 3, member="lora", dtype=BF16), {"dropout_p": 0.25, "training": True}),
]


def kernels():
    """Every kernel of the package, by name."""
    import bora_kernels.kernels as package

    found = {}
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        found |= {n: k for n, k in vars(module).items() if n.endswith("_kernel") and hasattr(k, "arg_names")}
    return found


def exercise(at):
    """In a process of its own: all cases between guards, the memory that launchers allocate included."""
    from bora_kernels import bora_linear

    launched = set()
    kernel_class = type(next(iter(kernels().values())))
    plain_getitem = kernel_class.__getitem__

    def noting_getitem(kernel, grid):
        launched.add(kernel.fn.__name__)
        return plain_getitem(kernel, grid)

    kernel_class.__getitem__ = noting_getitem
    results = {}
    for guarding in (True, False):
        with ExitStack() as patches:
            for owner, name in ALLOCATORS if guarding else ():
                allocate = guarding_allocator(getattr(owner, name), at)
                patches.enter_context(mock.patch.object(owner, name, allocate))
            results["nf4", guarding] = {"dense": dense_nf4(at if guarding else None)}
            results["weight of a convolution", guarding] = {"weight": weight_or_v(at if guarding else None)}
            results["gram", guarding] = {"sum": sum_of_grams(at if guarding else None)}
            results["gate", guarding] = gate_of_mlp(at if guarding else None)
            results["norm", guarding] = norm_of_rows(at if guarding else None)
            results["sums", guarding] = sums_of_layers(at if guarding else None)
            for M in (5, 131):
                results[f"mixed batch of {M}", guarding] = {"y": mixed_batch(M, at if guarding else None)}
            for adapters in (1, 3):  # parts added by a launch of their own
                y = mixed_batch(19, at if guarding else None, 520, adapters, torch.bfloat16)
                results[f"{adapters} adapters", guarding] = {"y": y}
            for case, options in CASES:
                tensors = case.inputs("cpu") | {"dy": case.upstream("cpu")}
                if guarding:
                    tensors = {name: None if t is None else guarded(t, at) for name, t in tensors.items()}
                torch.manual_seed(0)
                options = {"scaling": 0.5, "norm_order": case.order, "backend": "triton", **options}
                results[case, guarding] = run(bora_linear, tensors, tensors.pop("dy"), **options)
    for case in {case for case, _ in results}:
        for name, value in results[case, True].items():
            assert torch.equal(value, results[case, False][name]), f"{name} of {case} depends on its memory"
    assert launched == kernels().keys(), f"never launched: {kernels().keys() - launched}"


def dense_nf4(at):
    """A 4-bit weight with an odd number of elements and a last block that is not whole."""
    from bora_kernels.kernels.nf4 import dequantize_nf4

    N, K, block, nested_block = 13, 37, 64, 4
    generator = torch.Generator().manual_seed(0)
    parts = (
        torch.randint(256, ((N * K + 1) // 2, 1), dtype=torch.uint8, generator=generator),
        torch.randn(16, generator=generator),
        torch.randint(256, (-(-N * K // block),), dtype=torch.uint8, generator=generator),
        torch.randn(2, generator=generator),
        torch.randn(256, generator=generator),
        torch.randn((), generator=generator),
    )
    if at is not None:
        parts = tuple(guarded(part, at) for part in parts)
    return dequantize_nf4(parts, (N, K), (block, nested_block), torch.float32)


def weight_or_v(at):
    """V of a convolution, whose sizes are no multiples of a tile's."""
    from bora_kernels.kernels.weight_or_v import weight_or_v

    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator) for shape in ((19, 31, 9), (5, 31, 9), (19, 5), (4,), (19,), (31,))
    ]
    if at is not None:
        tensors = [guarded(t, at) for t in tensors]
    return weight_or_v(*tensors, scaling=0.5, channels_last=False, dtype=torch.float32)[0]


def sum_of_grams(at):
    """The Gram matrix of more ranks than programs add for themselves, in three parts."""
    from bora_kernels.kernels.gram import add_gram

    products = torch.randn(3, 5 + 67, 67, generator=torch.Generator().manual_seed(0))
    if at is not None:
        products = guarded(products, at)
    assert add_gram(products, 5) == 1
    return products[0].clone()


def mixed_batch(M, at, K=517, adapters=3, factors=torch.float32):
    """Few tokens or many, each with one of the adapters; K is split, and no size is a multiple of a tile's."""
    from bora_kernels.contract import Slots
    from bora_kernels.ops.mixed import mixed_linear
    from bora_kernels.serving.index import BatchIndex

    N, R = 53, 3
    generator = torch.Generator().manual_seed(0)
    shapes = (M, K), (N, K), (N,), (adapters, R, K), (adapters, R, N), (adapters, N), (adapters, K)
    x, weight, bias, *slots = (torch.randn(shape, generator=generator) for shape in shapes)
    tensors = [t.bfloat16() for t in (x, weight, bias)]
    tensors += [BatchIndex([i * 5 % adapters for i in range(M)], {}, x.device).tensor]
    tensors += [t.to(factors) if t.ndim == 3 else t for t in slots]
    if at is not None:
        tensors = [guarded(t, at) for t in tensors]
    x, weight, bias, index, *slots = tensors
    return mixed_linear(x, weight, bias, index, Slots(*slots), 1, "triton")


def gate_of_mlp(at):
    """The gate of an MLP and its backward, with sums for layers of several ranks."""
    from bora_kernels.kernels.add import add
    from bora_kernels.kernels.gated import Side, gate, gate_backward, gate_sums

    M, C = 37, 75
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((M, C),) * 4 + ((C,),) * 2]
    tensors += [torch.randn(shape, generator=generator) for shape in ((M, 3), (M, 17), (M, 1))]
    if at is not None:
        tensors = [guarded(tensor, at) for tensor in tensors]
    e, f, dh, other_dh, a_e, a_f, u_e, u_f, v = tensors  # de is written over dh
    sides = Side(a_e, u_e, True), Side(a_f, u_f, True), Side(None, v, True)
    de, df, sums = gate_sums(e, f, dh, sides, "silu", precision="ieee")
    made = [
        gate(e, f, "gelu"),
        *gate_backward(e, f, other_dh, "gelu_tanh"),
        add(e.clone() if at is None else guarded(e.clone(), at), f),
        de,
        df,
        *[part for pair in sums for part in pair],
    ]
    return {str(number): tensor for number, tensor in enumerate(made)}


def sums_of_layers(at):
    """Sums over x for two layers and for three, of several ranks."""
    from bora_kernels.kernels.shared_sums import Share, shared_sums

    M, C, made = 37, 75, {}
    for ranks in ((3, 17, 1), (2, 0)):
        generator = torch.Generator().manual_seed(0)
        shapes = [(M, C)] * (1 + len(ranks)) + [(M, R) for R in ranks if R]
        tensors = [torch.randn(shape, generator=generator) for shape in shapes] + [torch.ones(2)]
        x, *rest = tensors if at is None else [guarded(tensor, at) for tensor in tensors]
        dxs, vs = rest[: len(ranks)], [*rest[len(ranks) : -1], None]
        shares = [Share(dx, v, True, rest[-1]) for dx, v in zip(dxs, vs, strict=False)]
        dx, sums = shared_sums(x, shares, precision="ieee")
        made |= {f"dx of {len(ranks)}": dx}
        made |= {f"{len(ranks)} {i}": part for i, pair in enumerate(sums) for part in pair if part is not None}
    return made


def norm_of_rows(at):
    """RMSNorm of rows that fill no tile, several a program and one."""
    from bora_kernels.kernels.rms import rms_norm, rms_norm_backward

    made = {}
    for M, K in ((131, 37), (3, 2051)):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=generator) for shape in ((M, K), (M, K), (K,))]
        x, dy, weight = tensors if at is None else [guarded(tensor, at) for tensor in tensors]
        made[f"y {K}"] = rms_norm(x, weight, 1.0, 1e-6)
        made[f"dx {K}"] = rms_norm_backward(dy, x, weight, 1.0, 1e-6)
    return made


def guarding_allocator(allocate, at):
    def allocate_guarded(*args, **kwargs):
        return guarded(allocate(*args, **kwargs), at)

    return allocate_guarded


@pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))
@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("at", [pytest.param("start", marks=pytest.mark.slow), "end"])
def test_kernels_stay_within_their_tensors(at, interpreter_bf16):
    result = run_isolated(exercise, at)
    assert not faulted(result), result.stderr.decode()
    assert result.returncode == 0, result.stderr.decode()
