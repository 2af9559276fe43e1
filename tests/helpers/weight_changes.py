"""Changes of a weight by their definition, in loops."""

from __future__ import annotations

import math

import pytest

FIELDS = ("magnitude_row", "direction_row", "magnitude_col", "direction_col")


def loops(before, after):
    """ΔM and ΔD by their definition, one row or column at a time, in float64."""
    values = []
    for a, b in ((before, after), (before.T, after.T)):
        magnitude, direction = [], []
        for old, new in zip(a.double().tolist(), b.double().tolist(), strict=True):
            old_norm, new_norm = math.hypot(*old), math.hypot(*new)
            magnitude.append(abs(new_norm - old_norm))
            turned = old_norm > 0 and new_norm > 0
            pairs = zip(old, new, strict=True)
            direction.append(math.fsum((n / new_norm - o / old_norm) ** 2 for o, n in pairs) / 2 if turned else 0.0)
        values += [math.fsum(magnitude) / len(magnitude), math.fsum(direction) / len(direction)]
    return dict(zip(FIELDS, values, strict=True))


def assert_change(change, before, after, relative):
    expected = loops(before.detach(), after.detach())
    assert {f: getattr(change, f) for f in FIELDS} == pytest.approx(expected, rel=relative, abs=1e-30)
