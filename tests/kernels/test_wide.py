"""The passes over tokens at larger ranks: what they leave against float64, and which calls take them."""

import pytest
import torch
from helpers.cases import HALVES, NAMES, Case, check_layer, orders, require

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.kernels import low_rank
from bora_kernels.kernels.config import target
from bora_kernels.kernels.gemm import fits_descriptor
from bora_kernels.kernels.terms import high_term, terms_of
from bora_kernels.rounding import fold

pytestmark = pytest.mark.sampled(6)
SHAPES = [(37, 72, 65), (70, 136, 96), (5, 264, 128), (131, 40, 200), (64, 128, 256), (33, 200, 300)]
FEW_RANKS = [(37, 72, 17), (131, 264, 20), (70, 136, 32)]  # which reductions take in the general pass
halves = pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)


def over(shapes):
    return pytest.mark.parametrize("M, C, R", shapes, ids=["x".join(map(str, shape)) for shape in shapes])


@pytest.fixture(autouse=True)
def half_precision_in_the_interpreter(device):
    require("triton", torch.bfloat16)


@pytest.fixture
def wide_calls(monkeypatch, device):
    """What the wide passes are called with; skips where this device does not have them."""
    if target(torch.empty(0, device=device).get_device())[0] not in (0, 90):
        pytest.skip("on Hopper only")
    calls = []
    for name in ("project_wide", "reduce_wide"):
        function = getattr(low_rank, name)

        def noted(*args, name=name, function=function, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(low_rank, name, noted)
    return calls


def randn(*shape, device, seed=0):
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def relative(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def digits(dtype):
    """A relative error that two terms keep below: what the second one leaves, or float32's sums."""
    return {torch.bfloat16: 2.0**-17, torch.float16: 2.0**-20}[dtype]


@halves
@over(FEW_RANKS + SHAPES)
@pytest.mark.parametrize("scaled", [True, False], ids=["scale", "no-scale"])
def test_projections_have_the_digits_of_two_terms(M, C, R, dtype, scaled, device, wide_calls):
    t, factor = randn(M, C, device=device).to(dtype), randn(R, C, device=device, seed=1)
    scale = randn(C, device=device, seed=2).abs() + 0.5 if scaled else None
    got, parts, _ = low_rank.project(t, factor, scale, None, None, scaling=3.0, dropout_p=0.0, precision="ieee")
    exact = 3.0 * (t.double() * (1.0 if scale is None else scale.double())) @ factor.double().T
    assert wide_calls == ["project_wide"]
    assert relative(parts if parts.dim() == 2 else parts.sum(0), exact) < digits(dtype)
    assert torch.equal(got, fold(t, scale)) if scaled else got is t


@halves
@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("R", [20, 150])
def test_a_projection_of_the_rounded_matrix_where_lines_are_cancelled(R, dtype, cancelled, device, wide_calls):
    M, C = 37, 104
    t, factor = randn(M, C, device=device).to(dtype), randn(R, C, device=device, seed=1)
    scale, word = randn(C, device=device, seed=2).abs() + 0.5, torch.tensor([0.0, float(cancelled)], device=device)
    got, _, rounded = low_rank.project(t, factor, scale, word, None, scaling=3.0, dropout_p=0.0, precision="ieee")
    if cancelled:
        exact = 3.0 * got.double() @ factor.double().T
        assert relative(rounded if rounded.dim() == 2 else rounded.sum(0), exact) < digits(dtype)
    assert wide_calls == ["project_wide"] and rounded is not None


@halves
@over(SHAPES)
@pytest.mark.parametrize("cancelled", [None, False, True])
def test_sums_over_tokens_take_the_projection_in_one_term_or_two(M, C, R, dtype, cancelled, device, wide_calls):
    t, other = (randn(M, C, device=device, seed=seed).to(dtype) for seed in (0, 1))
    projection = randn(M, R, device=device, seed=2)
    word = None if cancelled is None else torch.tensor([float(cancelled), 0.0], device=device)
    parts, totals = low_rank.reduce(t, other, projection, word, None, dropout_p=0.0, precision="ieee")
    one_term = t.double().T @ projection.to(dtype).double()
    exact = t.double().T @ projection.double()
    assert wide_calls == ["reduce_wide"]
    assert relative(parts.sum(0), exact if cancelled else one_term) < (digits(dtype) if cancelled else 1e-6)
    if not cancelled:  # the bound can tell
        assert relative(parts.sum(0), exact) > 2.0**-14
    assert relative(totals.sum(0), (t.double() * other.double()).sum(0)) < 1e-6


def test_sums_without_totals(device, wide_calls):
    t, projection = randn(70, 136, device=device).bfloat16(), randn(70, 96, device=device, seed=1)
    parts, totals = low_rank.reduce(t, None, projection, None, None, dropout_p=0.0, precision="ieee")
    assert totals is None and wide_calls == ["reduce_wide"]
    assert relative(parts.sum(0), t.double().T @ projection.bfloat16().double()) < 1e-6


@pytest.mark.parametrize("kind", ["few ranks", "float32", "dropout", "columns first", "rows of 2 bytes more"])
def test_other_calls_keep_the_general_passes(kind, device, wide_calls):
    M, C, R = 19, 40, 16 if kind == "few ranks" else 70
    t = randn(M, C, device=device).to(torch.float32 if kind == "float32" else torch.bfloat16)
    t = t.T.contiguous().T if kind == "columns first" else t[:, :-1] if kind == "rows of 2 bytes more" else t
    t = t.contiguous() if kind == "rows of 2 bytes more" else t
    C = t.shape[1]
    seed = torch.zeros(1, dtype=torch.int64, device=device) if kind == "dropout" else None
    options = {"dropout_p": 0.0, "precision": "ieee"}
    factor = randn(R, C, device=device)
    parts = low_rank.project(t, factor, None, None, seed, scaling=1.0, **options)[1]
    projection = parts if parts.dim() == 2 else parts.sum(0)
    sums = low_rank.reduce(t, None, projection, None, seed, **options)[0]
    assert wide_calls == []
    assert relative(projection, t.double() @ factor.double().T) < 2.0**-17
    assert relative(sums.sum(0), t.double().T @ projection.to(t.dtype).double()) < 1e-6


@halves
@pytest.mark.parametrize("R, group", [(65, 64), (64, 64), (130, 128), (40, 64), (20, 32)])
@pytest.mark.parametrize("transposed", [False, True])
def test_terms_lie_in_groups_and_add_up(R, group, dtype, transposed, device):
    C = 45
    factor = randn(R, C, device=device).T if transposed else randn(C, R, device=device)
    scale = randn(C, device=device, seed=1)
    terms = terms_of(factor, scale, group, dtype).view(C, -1, 2, group)
    high, low = (terms[:, :, i].reshape(C, -1) for i in (0, 1))
    exact = factor * scale[:, None]
    assert torch.equal(high[:, :R], exact.to(dtype))
    # what is left of the product as it was rounded, or, by a fused multiply-add, as it was not
    left = (exact - high[:, :R].float()).to(dtype)
    fused = (factor.double() * scale.double()[:, None] - high[:, :R].double()).float().to(dtype)
    assert ((low[:, :R] == left) | (low[:, :R] == fused)).all()
    assert not high[:, R:].any() and not low[:, R:].any()


@halves
def test_a_high_term_has_rows_that_a_descriptor_addresses(dtype, device):
    for R in (33, 70, 96):
        matrix = randn(19, R, device=device)
        high = high_term(matrix, dtype)
        assert torch.equal(high, matrix.to(dtype)) and fits_descriptor(high)


@orders
@halves
@pytest.mark.parametrize("R, half", [(18, False), (65, True), (150, False)])
def test_layers_whose_ranks_fill_no_tile(R, half, dtype, order, device, wide_calls):
    case = Case(19, 40, 136, R, dtype=dtype, order=order, adapter_dtype=dtype if half else torch.float32)
    check_layer("triton", case.inputs(device), case.upstream(device), norm_order=order)
    expected = {"project_wide"} if R <= 32 else {"project_wide", "reduce_wide"}
    assert set(wide_calls) == expected  # not how often: a GPU's first calls run stages twice
