"""What recordings take: no memory of the stage's scratch, and no more than the cache may hold."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from helpers.fake_driver import Kernel, assert_chain, chain, vectors

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.replay import plan_cache, stage
from bora_kernels.replay.driver import Graph
from bora_kernels.replay.recording import empty, launch

GRAPH = Graph.nbytes


@pytest.fixture(autouse=True)
def _limit():
    before = plan_cache.max_bytes
    plan_cache.clear()
    yield
    plan_cache.max_bytes = before


def call(run, *sizes, times=1):
    for size in sizes:
        for _ in range(times):
            a, b = vectors(size)
            assert_chain(run(a, b, scale=2.0), a, b)


def alive(driver):
    gc.collect()
    return sum(graph is not None for graph in driver.graphs)


# ---- the bound ----


def test_what_is_counted(driver):
    run, _ = chain(Kernel(driver))
    assert plan_cache.bytes == plan_cache.size == 0 and plan_cache.max_bytes == 256 << 20
    call(run, 10)
    one = plan_cache.bytes
    assert plan_cache.size == 1 and 1000 < one < 100_000
    call(run, 11, 12)
    assert plan_cache.size == 3 and plan_cache.bytes == 3 * one
    call(run, 10, times=5)
    assert plan_cache.size == 3 and plan_cache.bytes == 3 * one + GRAPH and alive(driver) == 1
    plan_cache.clear()
    assert plan_cache.bytes == plan_cache.size == alive(driver) == 0
    call(run, 10, times=5)
    assert plan_cache.size == 1 and plan_cache.bytes == one + GRAPH


def test_graphs_go_first_the_least_recently_used_first(driver):
    run, calls = chain(Kernel(driver))
    for size in range(10, 18):
        call(run, size, times=4)
    call(run, 10, 13)  # used again, though made first
    everything = plan_cache.bytes
    plan_cache.max_bytes = everything - GRAPH  # room for an eighth less
    graphs = alive(driver)
    assert graphs < 8 and plan_cache.size == 8 and plan_cache.bytes == everything - (8 - graphs) * GRAPH
    kept = [graph[0][1][3] for graph in driver.graphs if graph]  # the n that their kernels got
    assert sorted(kept) == sorted([11, 12, 14, 15, 16, 17, 10, 13][-graphs:])
    plan_cache.max_bytes = 2 * GRAPH
    assert sorted(graph[0][1][3] for graph in driver.graphs if graph) == [10, 13][-alive(driver) :]
    assert len(calls) == 8
    call(run, *range(10, 18), times=6)
    assert len(calls) == 8 and plan_cache.bytes <= plan_cache.max_bytes


def test_recordings_go_after_the_last_graph(driver):
    run, calls = chain(Kernel(driver))
    call(run, 10)
    one = plan_cache.bytes
    plan_cache.max_bytes = 8 * one
    call(run, *range(11, 18))
    assert plan_cache.size == 8 and len(calls) == 8
    call(run, 10)
    call(run, 18)
    assert plan_cache.bytes <= 8 * one and plan_cache.size < 9
    call(run, 10, 17, 18)  # the last that were used
    assert len(calls) == 9
    call(run, 11)
    assert len(calls) == 10


def test_a_graph_that_was_dropped_is_made_again_after_use(driver):
    run, calls = chain(Kernel(driver))
    call(run, 10, times=6)
    plan_cache.max_bytes = GRAPH // 2
    assert alive(driver) == 0 and plan_cache.size == 1
    plan_cache.max_bytes = 256 << 20
    made = len(driver.graphs)
    call(run, 10, times=2)
    assert len(driver.graphs) == made
    call(run, 10, times=2)
    assert len(driver.graphs) == made + 1 and len(calls) == 1


def test_no_room_at_all(driver):
    plan_cache.max_bytes = 0
    run, calls = chain(Kernel(driver))
    call(run, 10, 11, times=3)
    assert plan_cache.size == plan_cache.bytes == 0 and len(calls) == 6


def test_many_lengths_stay_within_the_bound(driver):
    run, _ = chain(Kernel(driver))
    plan_cache.max_bytes = 10 * GRAPH
    generator = torch.Generator().manual_seed(0)
    for size in torch.randint(1, 60, (600,), generator=generator).tolist():
        call(run, size)
        assert plan_cache.bytes <= plan_cache.max_bytes
    assert 1 <= alive(driver) <= 10


def test_refusals_are_counted_too(driver):
    run, calls = chain(Kernel(driver, num_ctas=2))
    with pytest.warns(UserWarning, match="cannot replay"):
        call(run, *range(10, 20))
    assert plan_cache.size == 10 and 0 < plan_cache.bytes < 100_000


def test_threads_in_a_small_cache(driver):
    """Plans and graphs vanish under replays that run."""
    run, _ = chain(Kernel(driver))
    plan_cache.max_bytes = 3 * GRAPH
    failures = []

    def work(offset):
        try:
            for turn in range(60):
                call(run, 10 + (offset + turn) % 7, times=2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert plan_cache.bytes == sum(entry.nbytes for entry in plan_cache._entries) <= plan_cache.max_bytes


@pytest.mark.parametrize(
    "value, error", [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError)]
)
def test_bad_limits(value, error):
    before = plan_cache.max_bytes
    with pytest.raises(error, match="max_bytes must"):
        plan_cache.max_bytes = value
    assert plan_cache.max_bytes == before


# ---- what a recording keeps ----


def test_a_recording_keeps_no_scratch(driver):
    """Of twenty tensors one after the other two are there at a time; a replay packs them likewise."""
    kernel, most = Kernel(driver), []
    gc.collect()
    gc.freeze()  # so that each of the collections below looks at what is new

    @stage.stage
    def run(a):
        references, last = [], a
        for _ in range(20):
            scratch = empty((10,), torch.float32, a.device)
            references.append(weakref.ref(scratch.untyped_storage()))
            launch(kernel, (1,), (last, None, scratch), n=10, scale=1.5, ONE=1)
            last = scratch
            del scratch
            gc.collect()
            most.append(sum(reference() is not None for reference in references))
        y = empty((10,), torch.float32, a.device)
        launch(kernel, (1,), (last, None, y), n=10, scale=2.0, ONE=1)
        return (y,)

    for _ in range(5):
        (a,) = vectors(count=1)
        torch.testing.assert_close(run(a)[0], a * 2 * 1.5**20)
    assert len(most) == 20 and max(most) <= 2  # recorded once
    assert len(driver.launches) == 4 * 21


def test_scratch_lives_as_long_as_a_view_of_it(driver):
    """A tensor that is gone may have left its memory to a view."""
    kernel = Kernel(driver)

    @stage.stage
    def run(a):
        view = empty((30,), torch.float32, a.device)[10:20]
        launch(kernel, (1,), (a, None, view), n=10, scale=3.0, ONE=1)
        y = empty((10,), torch.float32, a.device)
        launch(kernel, (1,), (view, a, y), n=10, scale=2.0, ONE=1)
        return (y,)

    for _ in range(5):
        (a,) = vectors(count=1)
        torch.testing.assert_close(run(a)[0], 7 * a)
    assert len(driver.launches) == 8


def test_memory_of_freed_scratch_is_not_taken_for_scratch(driver):
    """What was freed is handed on, also to what a stage must not use: that is noticed."""
    kernel, same = Kernel(driver), []

    @stage.stage
    def run(a, *, attempt):
        scratch, y = empty((1000,), torch.float32, a.device), empty((10,), torch.float32, a.device)
        address = scratch.data_ptr()
        launch(kernel, (1,), (a, None, scratch), n=10, scale=3.0, ONE=1)
        del scratch
        foreign = torch.ones(1000)
        same.append(foreign.data_ptr() == address)
        launch(kernel, (1,), (a, foreign, y), n=10, scale=2.0, ONE=1)
        return (y,)

    with pytest.warns(UserWarning, match="memory that is neither its input nor from `empty`"):
        for attempt in range(20):
            (a,) = vectors(count=1)
            for _ in range(2):
                torch.testing.assert_close(run(a, attempt=attempt)[0], 2 * a + 1)
    assert not driver.launches
    if not any(same):
        pytest.skip("the allocator handed no memory on")


# ---- inputs that share memory ----


def shared():
    a = torch.randn(10)
    yield "the same", (a, a)
    yield "a view", (a, a.view(10))
    base = torch.randn(15)
    yield "in part", (base[:10], base[5:])


@pytest.mark.parametrize("name", [name for name, _ in shared()])
def test_inputs_that_share_memory_are_not_recorded_again_and_again(driver, monkeypatch, name):
    """From x + x it cannot be told which of the two a kernel read."""
    run, _ = chain(Kernel(driver))
    recorded, record = [], stage.record
    monkeypatch.setattr(stage, "record", lambda *arguments: recorded.append(1) or record(*arguments))
    tensors = next(tensors for case, tensors in shared() if case == name)
    for _ in range(3):
        assert_chain(run(*tensors, scale=2.0), *tensors)
    assert not recorded and not plan_cache.size
    apart = vectors()
    if tensors[0].data_ptr() & 15 == tensors[1].data_ptr() & 15 == 0:
        assert_chain(run(*apart, scale=2.0), *apart)
        for _ in range(3):  # what was recorded from tensors that are apart serves these, too
            assert_chain(run(*tensors, scale=2.0), *tensors)
        assert len(recorded) == 1 and len(driver.launches) == 9
