"""Layers that share a plan come with their own tensors, step for step: each set of addresses gets its own graph."""

import pytest
import torch
from helpers.fake_driver import Kernel, vectors

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.replay import plan, plan_cache
from bora_kernels.replay.driver import Graph
from bora_kernels.replay.recording import empty, launch
from bora_kernels.replay.stage import stage

GRAPH = Graph.nbytes


@pytest.fixture
def run(driver):
    """y = 16·a by four kernels; its memory is a buffer that the test owns, so that addresses recur."""
    kernel = Kernel(driver)

    @stage
    def run(a):
        t = a
        for _ in range(4):
            made = empty(tuple(a.shape), torch.float32, a.device)
            launch(kernel, (1,), (t, None, made), n=a.shape[0], scale=2.0, ONE=1)
            t = made
        return (t,)

    return run


@pytest.fixture
def memory(monkeypatch):
    """Results and workspaces lie where they lay before: one buffer for each layer."""
    buffers = {}

    def of(layer):
        def allocate(shape, strides, dtype):
            key = layer, shape, dtype
            if key not in buffers:
                buffers[key] = torch.empty_strided(shape, strides, dtype=dtype)
            return buffers[key]

        monkeypatch.setattr(plan, "allocate", allocate)

    return of


def steps(run, memory, layers, count, change=True):
    for _ in range(count):
        for number, a in enumerate(layers):
            if change:
                a.normal_()
            memory(number)
            (y,) = run(a)
            torch.testing.assert_close(y, 16 * a, rtol=1e-6, atol=0)


def alive(driver):
    return sum(graph is not None for graph in driver.graphs)


def test_addresses_that_recur_are_not_set_anew(run, memory, driver):
    layers = vectors(count=3)
    steps(run, memory, layers, 5)
    made, updates = alive(driver), driver.updates
    assert made == 4 and plan_cache.size == 1  # the plan's own, and one for each layer
    launches = len(driver.launches)
    steps(run, memory, layers, 4)
    assert alive(driver) == made and driver.updates == updates
    assert len(driver.launches) == launches + 4 * 3 * 4


def test_addresses_that_are_new_each_time_take_the_plans_graph(run, driver):
    kept = [(a, run(a)) for (a,) in (vectors(count=1) for _ in range(12))]
    assert all(torch.allclose(y, 16 * a) for a, (y,) in kept)
    assert alive(driver) == 1 and driver.updates == 4 * 8


def test_one_layer_has_one_graph(run, memory, driver):
    steps(run, memory, vectors(count=1), 12)
    assert alive(driver) == 1 and driver.updates == 0


def test_a_layer_that_moves_meets_the_graph_of_where_it_is(run, memory, driver):
    layers = vectors(count=2)
    steps(run, memory, layers, 6)
    moved = [layers[1], vectors(count=1)[0], layers[0]]
    steps(run, memory, moved, 1)
    steps(run, memory, layers, 2)


@pytest.mark.parametrize(("name", "value"), [("_MOST_OWN_BYTES", 39), ("_LEAST_OWN_KERNELS", 5)])
def test_large_stages_and_those_of_few_kernels_have_one_graph(name, value, run, memory, driver, monkeypatch):
    monkeypatch.setattr(plan, name, value)
    steps(run, memory, vectors(count=3), 8)
    assert alive(driver) == 1


def test_they_count_and_leave_room(run, memory, driver):
    layers = vectors(count=4)
    steps(run, memory, layers, 6)
    entry = next(iter(plan_cache._entries))
    assert len(entry.own) == 4 and entry.nbytes == plan_cache.bytes
    everything, limit = plan_cache.bytes, plan_cache.max_bytes
    try:
        plan_cache.max_bytes = everything - GRAPH  # all of an entry's graphs go
        assert alive(driver) == 0 and plan_cache.bytes == everything - 5 * GRAPH
        plan_cache.max_bytes = 2 * (plan_cache.bytes + 3 * GRAPH)
        steps(run, memory, layers, 8)
        assert alive(driver) == 3  # half of the limit holds the plan's graph and two
    finally:
        plan_cache.max_bytes = limit
    del entry
    plan_cache.clear()
    assert alive(driver) == 0 and plan_cache.bytes == 0


@pytest.mark.filterwarnings("error")
def test_without_memory_for_one_the_plans_graph_goes_on(run, memory, driver):
    layers = vectors(count=2)
    steps(run, memory, layers, 3)
    driver.failing["cuGraphInstantiate"] = 2
    steps(run, memory, layers, 4)
    del driver.failing["cuGraphInstantiate"]
    updates = driver.updates
    steps(run, memory, layers, 2)
    (entry,) = plan_cache._entries
    assert entry.graph is not None and not entry.own and driver.updates > updates
