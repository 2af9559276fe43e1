"""The accuracy rule itself: what it lets pass, what it refuses, and what it says then."""

import pytest
import torch
from helpers.accuracy import FLOOR, assert_accurate, assert_equal, assert_same_finite
from helpers.on_gpu import assert_runs, run_script

EXACT = torch.linspace(1, 2, 10_000, dtype=torch.float64)


def off_by(error, dtype=torch.float32):
    return (EXACT * (1 + error)).to(dtype)


def check(actual, plain, **options):
    assert_accurate({"y": actual}, {"y": plain}, {"y": EXACT}, samples=10_000, **options)


def test_twice_the_error_of_plain_passes_and_no_more():
    check(off_by(2e-3), off_by(1e-3))
    check(off_by(-2e-3), off_by(1e-3))
    with pytest.raises(AssertionError, match=r"y \[10000\] torch.float32: error 2.1.e-03 exceeds 2.06e-03 \(plain"):
        check(off_by(2.1e-3), off_by(1e-3))


def test_floor():
    check(EXACT.float(), EXACT.float(), terms={"y": EXACT})
    check(off_by(0.9 * FLOOR, torch.float32), EXACT.float())
    with pytest.raises(AssertionError, match="exceeds"):
        check(off_by(1.5 * FLOOR, torch.float32), EXACT.float())
    with pytest.raises(AssertionError, match="exceeds"):
        check(off_by(0.9 * FLOOR, torch.float64), EXACT)
    check(off_by(1.5 * FLOOR, torch.float32), EXACT.float(), terms={"y": 2 * EXACT})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_never_passes(value):
    spoiled = EXACT.float()
    spoiled[7] = value
    for plain in (EXACT.float(), spoiled):
        with pytest.raises(AssertionError, match=r"(?s)y .*at \[7\]: (nan|inf), exact 1.0007"):
            check(spoiled, plain)


def test_dtype_shape_and_names_must_match():
    with pytest.raises(AssertionError, match="y is torch.float64, plain is torch.float32"):
        check(EXACT, EXACT.float())
    with pytest.raises(AssertionError, match="exact is"):
        check(EXACT.float()[:1], EXACT.float())
    with pytest.raises(AssertionError):
        assert_accurate({"x": EXACT}, {"y": EXACT}, {"y": EXACT}, samples=1)


def test_equal_tensors_and_what_is_said_of_others():
    one = {"y": torch.ones(3), "d_x": torch.tensor([1.0, 2.0])}
    assert_equal(one, {name: t.clone() for name, t in one.items()})
    assert_equal([*one.values()], (t for t in one.values()))
    with pytest.raises(AssertionError, match=r"(?s)^d_x: .*Greatest absolute difference: 0.25 at index \(1,\)"):
        assert_equal(one, one | {"d_x": torch.tensor([1.0, 2.25])})
    for other in (torch.ones(3).double(), torch.ones(2), torch.tensor([1.0, 1.0, torch.nan])):
        with pytest.raises(AssertionError, match="^0: "):
            assert_equal([other], [torch.ones(3)])
        with pytest.raises(AssertionError, match="^0: "):
            assert_equal([other], [other.flip(0) + 1])
    for others in ({"y": one["y"]}, one | {"more": one["y"]}):
        with pytest.raises(AssertionError, match="d_x"):
            assert_equal(one, others)


def test_scripts_in_processes_of_their_own():
    """An error still fails, and what was printed arrives though the interpreter does not shut down."""
    assert (
        run_script("""
        print("said", end="")
    """).stdout
        == "said"
    )
    with pytest.raises(AssertionError, match="ValueError: on purpose"):
        assert_runs("raise ValueError('on purpose')")
    with pytest.raises(AssertionError):
        assert_runs("import sys; sys.exit(3)")


def test_same_finite():
    one, two = torch.tensor([1.0, torch.nan, torch.inf]), torch.tensor([2.0, torch.inf, torch.inf])
    assert_same_finite({"y": one}, {"y": two})
    more = torch.tensor([torch.nan, torch.nan, torch.inf])
    assert_same_finite({"y": more}, {"y": two}, exactly=False)
    with pytest.raises(AssertionError, match=r"y: 1 of 3 .* first at \[0\]: nan, plain 2.0"):
        assert_same_finite({"y": more}, {"y": two})
    with pytest.raises(AssertionError, match=r"first at \[0\]: 2.0, plain nan"):
        assert_same_finite({"y": two}, {"y": more}, exactly=False)
