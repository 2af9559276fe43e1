"""Which cases run of tests over many: those marked ``sampled(n)``."""

from __future__ import annotations

import zlib

import pytest


def sample(items: list[pytest.Item]) -> set[pytest.Item]:
    """All tests, but of one that is marked sampled the cases whose names a checksum picks, one at least."""
    chosen: dict[str, list[pytest.Item]] = {}
    for item in items:
        marker = item.get_closest_marker("sampled")
        test = item.nodeid if marker is None else item.nodeid.split("[")[0]
        picked = chosen.setdefault(test, [])
        if marker is None or zlib.crc32(item.name.encode()) % marker.args[0] == 0 or not picked:
            picked.append(item)
    return {item for picked in chosen.values() for item in picked}
