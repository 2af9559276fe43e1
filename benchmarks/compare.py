"""What got slower between two results: ``python -m benchmarks.report BEFORE.json AFTER.json --compare``.

A case's times are compared provider by provider, each clock apart: the step behind another one, on an idle device, as a
CUDA graph, and first calls. A provider that was measured before and failed or is missing now is told too.
"""

from __future__ import annotations

from typing import NamedTuple

from .records import CASE_FIELDS, by_case, title

CLOCKS = {
    "median": "step",
    "idle_median": "step on an idle device",
    "graph_median": "CUDA graph",
    "first": "first call",
    "second": "second call",
}
LIMIT = 0.05  # what counts as slower or faster: steps vary by some percent from run to run


class Change(NamedTuple):
    """One time of one provider in one case, in seconds."""

    case: str
    provider: str
    clock: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before

    def __str__(self) -> str:
        times = f"{1e3 * self.before:.3f} → {1e3 * self.after:.3f} ms"
        return f"{self.ratio:.2f}×  {self.case}: {self.provider}, {self.clock}, {times}"


class Comparison(NamedTuple):
    """Changes of more than the limit, the largest first, and what cannot be compared."""

    slower: list[Change]
    faster: list[Change]
    lost: list[str]  # measured before, and not after
    compared: int

    def __str__(self) -> str:
        parts = [f"{self.compared} times compared, a change is one of more than {LIMIT:.0%}"]
        for name, found in (("slower", self.slower), ("faster", self.faster), ("not measured any more", self.lost)):
            parts.append(f"{name}: {len(found) or 'none'}")
            parts += [f"  {line}" for line in found]
        return "\n".join(parts)


def compare(before: dict, after: dict) -> Comparison:
    """What changed between two results of one device.

    Raises ValueError for results of different devices, and where nothing was measured in both.
    """
    devices = [result["environment"]["device"] for result in (before, after)]
    if devices[0] != devices[1]:
        raise ValueError(f"results must be of the same device, got {devices[0]} and {devices[1]}")
    newer = by_case(after["records"])
    changes, lost = [], []
    for key, case in by_case(before["records"]).items():
        for provider, old in case.items():
            new = newer.get(key, {}).get(provider)
            if new is None and key not in newer:
                continue  # a case that was not asked for
            for field, clock in CLOCKS.items():
                if not old.get(field):
                    continue
                if new is None or not new.get(field):
                    reason = "missing" if new is None else new.get("reason") or new["status"]
                    lost.append(f"{title(key)}: {provider}, {clock} ({reason})")
                else:
                    changes.append(Change(title(key), provider, clock, old[field], new[field]))
    if not changes and not lost:
        raise ValueError(f"results must have cases in common ({', '.join(CASE_FIELDS)}), got none")
    slower = sorted((c for c in changes if c.ratio > 1 + LIMIT), key=lambda change: -change.ratio)
    faster = sorted((c for c in changes if c.ratio < 1 / (1 + LIMIT)), key=lambda change: change.ratio)
    return Comparison(slower, faster, lost, len(changes))
