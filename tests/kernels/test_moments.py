"""The sums of one read of W0 over either axis, whatever its strides, and how many programs share the read."""

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.cases import NAMES, require

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.kernels import moments as module
from bora_kernels.kernels.config import cdiv
from bora_kernels.kernels.moments_config import moments_config, moments_splits

pytestmark = pytest.mark.sampled(6)
VIEWS = {
    "rows": lambda W: W,
    "columns": lambda W: W.T.contiguous().T,
    "every-second-element": lambda W: torch.stack([W, W.flip(0)], dim=-1)[..., 0],
    "rows-of-odd-length": lambda W: torch.cat([W, W[:, :3]], dim=1)[:, : W.shape[1]],
}


@pytest.fixture(params=[1, 3], ids="{}-splits".format)
def splits(request, monkeypatch):
    config = module.moments_config

    def with_splits(*arguments):
        return request.param, config(*arguments)[1]

    monkeypatch.setattr(module, "moments_config", with_splits)
    return request.param


def sums(W, Z, coefficient):
    """X, G and squares of the dtype of Z."""
    W, weighted = W.to(Z.dtype), Z if coefficient is None else Z * coefficient[:, None].to(Z.dtype)
    squares = W.square()
    return {
        "X": W @ weighted,
        "G": Z.T @ weighted,
        "squares": (squares if coefficient is None else squares * coefficient.to(Z.dtype)).sum(1),
    }


@pytest.mark.parametrize("R, weighted", [(1, True), (16, False), (72, True)], ids=["R1", "R16-plain", "R72"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("view", VIEWS)
def test_sums_are_right(view, dtype, R, weighted, splits, device):
    require("triton", dtype)
    I, J = 45, 275
    W = VIEWS[view](torch.randn(I, J, device=device).to(dtype))
    Z = torch.randn(J, R, device=device)
    coefficient = torch.randn(J, device=device) if weighted else None
    cleared = torch.ones(4, device=device)
    products, squares = module.moments(W, Z, coefficient, "ieee", cleared=cleared)

    assert products.shape == (splits, I + R, R) and squares.shape == (splits, I)
    total = products.sum(0)
    actual = {"X": total[:I], "G": total[I:], "squares": squares.sum(0)}
    exact = sums(W, Z.double(), coefficient)
    # a factor of a bf16 weight is a sum of two bf16 numbers
    floor = {"floor": 2.0**-17} if dtype == torch.bfloat16 else {}
    terms = {"squares": W.double().square().sum(1) * 2} | {name: exact[name] for name in ("X", "G")}
    assert_accurate(actual, sums(W, Z, coefficient), exact, samples=R * R, terms=terms, **floor)
    assert not cleared.any()

    again, none = module.moments(W, Z, coefficient, "ieee", squares_needed=False)
    assert none is None and torch.equal(again, products)


WIDTHS = (512, 640, 896, 1024, 2048, 3584, 4093, 4096, 4864, 8192, 14336, 18944)


@pytest.mark.parametrize("processors", [108, 132, 144])
@pytest.mark.parametrize("R", [4, 16, 24, 64, 200])
def test_reads_of_a_weight_leave_no_third_of_the_device_idle(processors, R):
    """Over all pairs of widths and both axes: fewer programs only where no number of splits makes as many."""
    for I in WIDTHS:
        for J in WIDTHS:
            for transposed, squares in ((False, True), (True, True), (True, False)):
                splits, config = moments_config(90, processors, I, J, R, torch.bfloat16, True, transposed, squares)
                steps = cdiv(J, config["BLOCK_SIZE_J"])
                rows = cdiv(I, config["BLOCK_SIZE_I"]) + cdiv(R, config["BLOCK_SIZE_G"])
                blocks = rows * cdiv(R, config["BLOCK_SIZE_R"])
                most = cdiv(steps, cdiv(steps, min(16, cdiv(steps, 4))))
                assert 1 <= splits <= most
                assert (splits - 1) * cdiv(steps, splits) < steps, "a split has nothing to do"
                assert blocks * splits >= min(2 / 3 * processors, blocks * most), f"{I} x {J}: {blocks} x {splits}"


def test_splits_that_were_measured_to_be_best_are_chosen():
    """On an H100, bf16, rank 16: tiles of W of 128 x 128 and of 128 x 64, and 128 x 64 of rank 64."""
    large, small, wide = (2, 0.8), (3, 1.2), (2, 2.0)
    for kind, (blocks, steps), best in (
        (large, (33, 32), {4}), (large, (113, 32), {1}), (large, (33, 112), {4}), (large, (149, 28), {3, 4, 5}),
        (small, (33, 224), {8}), (small, (29, 296), {9}), (small, (149, 56), {2, 4, 5}),
        (wide, (33, 64), {8}), (wide, (113, 64), {2}), (wide, (33, 224), {8}),
    ):  # fmt: skip
        tile = 128 * 128 * 2 if kind is large else 128 * 64 * 2
        part = 8 * 128 * (blocks - 1) * (64 if kind is wide else 16)
        assert moments_splits(132, *kind, blocks, steps, tile, part) in best, (kind, blocks, steps)


@pytest.mark.parametrize(
    "N, K, columns, squares, best",
    [
        (14336, 4096, True, True, {8}),
        (4096, 14336, True, True, {2, 4}),
        (18944, 3584, True, True, {9}),
        (14336, 3584, True, True, {8, 9}),
        (18944, 3584, False, True, {3, 4, 5, 6, 7}),
        (4096, 4096, False, True, {8, 9}),
        (4096, 4096, True, False, {8, 9, 12}),
        (2048, 3584, True, False, {8, 10, 12}),
    ],
)
def test_faster_memory_takes_more_programs(N, K, columns, squares, best):
    """Splits that were measured to be best, or nearly, on an H200, whose memory is 1.47 times as fast, at rank 16."""
    I, J = (K, N) if columns else (N, K)
    assert moments_config(90, 132, I, J, 16, torch.bfloat16, True, columns, squares, 4.92)[0] in best
