"""Random sizes, strides, dtypes, members, orders and conventions, by the accuracy rule."""

from dataclasses import dataclass

import pytest
import torch
from conftest import CUDA
from helpers.cases import HALVES, VARIANTS, Case, check_layer, require
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: its dimensions' order, gaps between elements, and where it starts."""

    transposed: bool
    gap: int
    start: int

    def __call__(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        shape = tensor.shape[::-1] if self.transposed else tensor.shape
        strides, step = [], 1 + self.gap
        for size in reversed(shape):
            strides.insert(0, step)
            step = step * max(1, size) + self.gap
        if self.transposed:
            strides.reverse()
        memory = torch.full((self.start + step,), torch.nan, dtype=tensor.dtype, device=tensor.device)
        return memory[self.start :].as_strided(tensor.shape, strides).copy_(tensor)


DEVICE = "cuda" if CUDA else "cpu"
layouts = st.builds(Layout, st.booleans(), st.sampled_from([0, 0, 1, 3]), st.sampled_from([0, 0, 1, 8]))


@st.composite
def layers(draw, dtypes, sizes, ranks):
    """A case, a layout for each of its tensors and for dy, and the options of the layer."""
    member, order = draw(st.sampled_from(VARIANTS))
    dtype = draw(st.sampled_from(dtypes))
    case = Case(
        M=draw(st.integers(0, 70)),
        N=draw(sizes),
        K=draw(sizes),
        R=draw(ranks),
        dtype=dtype,
        member=member,
        order=order,
        adapter_dtype=draw(st.sampled_from([torch.float32, dtype])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
    )
    options = {"detach_norm": draw(st.booleans()), "scaling": draw(st.sampled_from([0.1, 0.5, -1.0]))}
    return case, draw(st.lists(layouts, min_size=8, max_size=8)), options


def check(backend, layer):
    case, (dy_layout, *input_layouts), options = layer
    require(backend, case.dtype)
    inputs = case.inputs(DEVICE)
    inputs = {name: layout(t) for (name, t), layout in zip(inputs.items(), input_layouts, strict=True)}
    check_layer(backend, inputs, dy_layout(case.upstream(DEVICE)), norm_order=case.order, **options)


@given(layers([torch.float64, torch.float32, *HALVES], st.integers(16, 150), st.integers(1, 70)))
@settings(max_examples=60)
def test_any_layer_in_torch(layer):
    check("torch", layer)


@given(layers([torch.float32, *HALVES], st.integers(16, 80), st.integers(1, 20)))
@settings(max_examples=15)
def test_any_layer_in_triton(layer):
    check("triton", layer)
