"""Launch grids by a model of the device: nothing is left idle that more splits would use."""

import pytest

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.contract import projection_parts
from bora_kernels.kernels.config import cdiv, parts_in_use


@pytest.mark.parametrize("processors", [108, 132, 144])
@pytest.mark.parametrize("columns", [512, 1024, 3584, 4096, 18944])
def test_a_projection_fills_the_device_and_takes_no_more_parts_than_that(processors, columns):
    """Over all numbers of tokens: a multiprocessor has no program only where all parts are in use already."""
    allocated = projection_parts(columns, 16)
    for tokens in range(1, 40_000, 37):
        parts = parts_in_use(allocated, tokens, processors)
        blocks = cdiv(tokens, 64)
        assert 1 <= parts <= allocated
        if parts < allocated:
            assert blocks * (parts + 1) > 2 * processors, "another part would still have been within two programs each"
        if parts > 1:
            assert (tokens // 64) * parts <= 2 * processors
