"""Recorded stages: a replay does what the stage did, on other tensors. The driver is played by Python on CPU memory."""

from __future__ import annotations

import ctypes
import struct
import threading

import pytest
import torch
from helpers.fake_driver import Kernel, assert_chain, chain, vectors

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.replay import driver as cuda_driver
from bora_kernels.replay import parameters, plan
from bora_kernels.replay.recording import Layout, beside_last_launch, empty, launch
from bora_kernels.replay.stage import stage


def test_replay_on_other_tensors(driver):
    run, calls = chain(Kernel(driver))
    for _ in range(4):
        a, b = vectors()
        assert_chain(run(a, b, scale=2.0), a, b)
    assert len(calls) == 1 and len(driver.launches) == 9
    assert driver.launches[2] == (2, (2, 3, 1, 128, 1, 1, 0), 7)  # grid, 4 warps, no shared memory; the stream


def test_the_graph_takes_addresses_that_moved(driver):
    run, _ = chain(Kernel(driver))
    kept = [run(*vectors(), scale=2.0) for _ in range(5)]  # what is kept is not allocated again
    assert driver.waits == [[], [0], [1]]
    assert len(driver.graphs) == 1 and driver.updates == 3  # of three kernels, in the replay after the graph's first
    a, b = vectors()
    for _ in range(20):
        a.normal_()
        results = run(a, b, scale=2.0)
        assert_chain(results, a, b)
        del results
    assert len(driver.launches) == 3 * 24 and len(kept) == 5


def test_captured_launches_are_single_kernels(driver):
    """A capture takes kernels; the graph afterwards must not run on what the capture's tensors were."""
    run, _ = chain(Kernel(driver))
    for driver.capturing in (False, True, True, False, False, True, True, False, True, False):
        updates = driver.updates
        a, b = vectors()
        assert_chain(run(a, b, scale=2.0), a, b)
        assert not driver.capturing or driver.updates == updates


def test_dependent_launches_are_so_one_by_one_and_in_captures(driver):
    """The second of three kernels may start before the first has ended; a graph of a plan takes it as any other."""
    plain, early = Kernel(driver), Kernel(driver, launch_pdl=True)

    @stage
    def run(a, b):
        first, second, z = (empty((10,), torch.float32, a.device) for _ in range(3))
        launch(plain, (1,), (a, None, first), n=10, scale=2.0, ONE=1)
        launch(early, (4, 5), (first, b, second), n=10, scale=3.0, ONE=1)
        launch(plain, (1,), (second, b, z), n=10, scale=1.0, ONE=1)
        return (z,)

    for driver.capturing in (False, False, False, False, False, True):
        a, b = vectors()
        torch.testing.assert_close(run(a, b)[0], 6 * a + 2 * b)
    assert driver.dependent == [1, 4, 13]  # of two replays before there is a graph, and the capture
    assert driver.launches[1] == driver.launches[13] == (1, (4, 5, 1, 128, 1, 1, 0), 7)
    assert driver.waits == [[], [0], [1]]


@pytest.mark.parametrize("capturing", [False, True])
def test_a_dependent_launch_that_fails_runs_as_python(driver, capturing):
    run, calls = chain(Kernel(driver, launch_pdl=True))
    run(*vectors(), scale=2.0)
    driver.capturing, driver.failing["cuLaunchKernelEx"] = capturing, 1
    with pytest.warns(UserWarning, match=r"cuLaunchKernelEx failed"):
        a, b = vectors()
        assert_chain(run(a, b, scale=2.0), a, b)
    assert len(calls) == 2


def test_launches_beside_another(driver):
    """They wait for what it waits for, what follows waits for both, and their scratch is apart."""
    kernel = Kernel(driver)

    @stage
    def run(a, b):
        first, beside, second, z = (empty((10,), torch.float32, a.device) for _ in range(4))
        launch(kernel, (1,), (a, None, first), n=10, scale=2.0, ONE=1)
        launch(kernel, (1,), (first, b, z), n=10, scale=1.0, ONE=1)
        with beside_last_launch():
            launch(kernel, (1,), (first, None, beside), n=10, scale=3.0, ONE=1)
            launch(kernel, (1,), (beside, None, second), n=10, scale=5.0, ONE=1)
        launch(kernel, (1,), (second, z, z), n=10, scale=1.0, ONE=1)
        return (z,)

    for _ in range(5):
        a, b = vectors()
        (z,) = run(a, b)
        torch.testing.assert_close(z, 32 * a + b)
    assert driver.waits == [[], [0], [0], [2], [1, 3]]
    places = {values[2] for values in (values for _, values, _ in driver.graphs[0])} - {z.data_ptr()}
    assert len(places) == 3  # none is used again while the others are


def test_launches_beside_one_that_is_itself_beside_another_wait_for_both(driver):
    kernel = Kernel(driver)

    @stage
    def run(a):
        y, z = (empty((10,), torch.float32, a.device) for _ in range(2))
        launch(kernel, (1,), (a, None, y), n=10, scale=2.0, ONE=1)
        for factor in (3.0, 5.0):
            with beside_last_launch():
                launch(kernel, (1,), (a, None, z), n=10, scale=factor, ONE=1)
        launch(kernel, (1,), (y, z, z), n=10, scale=1.0, ONE=1)
        return (z,)

    for _ in range(4):
        (a,) = vectors(count=1)
        torch.testing.assert_close(run(a)[0], 7 * a)
    waits = []
    for before in driver.waits:
        waits.append(set(before).union(*(waits[number] for number in before)))
    assert waits[3] == {0, 1, 2}


def test_results_are_separate_memory(driver):
    run, _ = chain(Kernel(driver))
    first, second, third = (run(*vectors(), scale=2.0) for _ in range(3))
    results = [t for results in (first, second, third) for t in results if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in results}) == 6


def other_calls():
    a, b = vectors()
    yield "options", (a, b), 3.0
    yield "size", tuple(vectors(11)), 2.0
    yield "alignment", tuple(torch.randn(11)[1:] for _ in range(2)), 2.0
    yield "dtype of an unread tensor", (a, b.view(torch.int32)), 2.0


@pytest.mark.parametrize("what", [name for name, _, _ in other_calls()])
def test_what_differs_is_recorded_anew(driver, what):
    run, calls = chain(Kernel(driver))
    run(*vectors(), scale=2.0)
    (tensors, scale) = next((tensors, scale) for name, tensors, scale in other_calls() if name == what)
    for _ in range(2):
        results = run(*tensors, scale=scale)
    assert len(calls) == 2
    assert_chain(results, tensors[0], tensors[1].view(torch.float32), scale)


def test_what_stands_for_layouts_does_not_stand_for_alignments(driver):
    """`prepared` is the same for tensors that lie alike but for the alignment of their addresses."""
    run, calls = chain(Kernel(driver))
    aligned, other = vectors(), (torch.randn(11)[1:], torch.randn(11)[1:])
    for tensors, recorded in ((aligned, 1), (other, 2), (aligned, 2), (other, 2), ((aligned[0], other[0]), 3)):
        assert_chain(run(*tensors, scale=2.0, prepared="these"), *tensors)
        assert len(calls) == recorded


def test_tensors_that_share_memory_are_not_recorded(driver):
    """From x + x it cannot be told which argument a kernel read; a later call with two tensors must be right."""
    run, calls = chain(Kernel(driver))
    a, b = vectors()
    assert_chain(run(a, a, scale=2.0), a, a)
    assert_chain(run(a, b, scale=2.0), a, b)
    assert_chain(run(b, a, scale=2.0), b, a)
    assert len(calls) == 2


def test_threads_do_not_mix_addresses(driver):
    run, _ = chain(Kernel(driver))
    run(*vectors(), scale=2.0)
    failures = []

    def work():
        for _ in range(50):
            a, b = vectors()
            try:
                assert_chain(run(a, b, scale=2.0), a, b)
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("lives", "offsets", "size"),
    [
        ({}, {}, 0),
        ({5: (100, 0, 1), 6: (40, 2, 3)}, {5: 0, 6: 0}, 100),  # never in use together
        ({5: (100, 0, 2), 6: (40, 1, 3), 7: (300, 3, 3)}, {5: 0, 6: 512, 7: 0}, 552),  # the largest first
        ({5: (4096, 0, 1), 6: (300, 1, 3), 7: (8192, 2, 3), 8: (4096, 3, 4)}, {5: 0, 6: 12288, 7: 0, 8: 8192}, 12588),
        ({5: (600, 0, 1), 6: (40, 0, 3), 7: (300, 2, 3)}, {5: 0, 6: 768, 7: 0}, 808),  # into what 5 left
    ],
)
def test_workspace(lives, offsets, size):
    assert plan._pack(lives) == (offsets, size)


class MapEncoder:
    """Stands in for the driver: an opaque map in which the address lies as it is, or otherwise."""

    def __init__(self, encode):
        self.encode = encode

    def cuTensorMapEncodeTiled(self, location, dtype, rank, address, *rest):  # noqa: N802
        assert location % 64 == 0 and address % 16 == 0
        sizes = rest[0][0], rest[0][1]
        ctypes.memmove(location, self.encode(address, sizes).ljust(128, b"."), 128)
        return 0


@pytest.mark.parametrize(
    ("encode", "place"),
    [
        (lambda address, sizes: struct.pack("<QII", address, *sizes), 0),
        (lambda address, sizes: struct.pack("<IIQ", *sizes, address), 8),
        (lambda address, sizes: struct.pack("<QII", address >> 4, *sizes), None),
        (lambda address, sizes: struct.pack("<QQ", address, address ^ 5), None),
    ],
    ids=["first", "later", "shifted", "twice"],
)
def test_where_a_tensor_map_has_its_address(monkeypatch, encode, place):
    monkeypatch.setattr(cuda_driver, "cuda", lambda: MapEncoder(encode))
    metadata = {"block_size": (2, 8), "swizzle": 3}
    tensor_map = parameters.TensorMap(Layout(torch.bfloat16, (4, 16), (16, 1)), (0, 0), metadata)
    tensor_map.offset, host = 64, memoryview(bytearray(256))
    assert tensor_map.encode(host) == (place is not None)
    if place is not None:
        assert tensor_map.offset == 64 + place
        parameters.WORD.pack_into(host, tensor_map.offset, 0x1230)
        assert bytes(host[64:192]) == encode(0x1230, (16, 4)).ljust(128, b".")


def test_a_stage_of_stages_is_one_recording(driver):
    """And its result may have another shape than what it allocated."""
    inner, calls = chain(Kernel(driver))
    outer_calls = []

    @stage
    def run(a, b, *, shape):
        outer_calls.append(shape)
        z, _, w = inner(a, b, scale=2.0)
        total, _, _ = inner(z, w, scale=1.0)
        return torch.ops.aten._unsafe_view(total, shape), w

    kept = []
    for _ in range(6):
        a, b = vectors()
        total, w = run(a, b, shape=(2, 5))
        assert total.shape == (2, 5) and total._base is None
        torch.testing.assert_close(total.flatten(), 3 * (6 * a + b) + 2 * a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(w, 2 * a)
        kept.append((total, w))
    assert len(outer_calls) == 1 and len(calls) == 2 and len(driver.graphs) == 1
    assert len(driver.launches) == 5 * 6  # the first run is Python's
    a, b = vectors()
    assert_chain(inner(a, b, scale=2.0), a, b)  # has no recording of its own yet
    assert len(calls) == 3
