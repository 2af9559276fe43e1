"""What got slower between two results, by case, provider and clock, and the exit status of the command."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import report
from benchmarks.compare import compare


def record(provider: str, tokens: int = 512, **measured) -> dict:
    case = {"level": "layer", "mode": "step", "shape": "96x48", "batch": 1, "length": tokens, "rank": 4}
    case |= {"dtype": "bf16", "checkpointing": False, "base": "dense", "provider": provider, "status": "measured"}
    return case | measured


def result(*records: dict, device: str = "a device") -> dict:
    return {"environment": {"device": device}, "gemm_tflops": {}, "records": list(records)}


BEFORE = result(
    record("frozen", median=1.0, idle_median=1.2, graph_median=0.9),
    record("fused-bora", median=2.0, idle_median=2.2, graph_median=1.9),
    record("fused-bora", tokens=1000, median=4.0),
    record("peft-dora", status="skipped"),
    record("fused-bora", tokens=64, mode="first-call", first=13.0, second=0.01),
)


def changed(**values: float) -> dict:
    """The first result with other times; keys are provider__tokens__field."""
    new = copy.deepcopy(BEFORE)
    for name, value in values.items():
        provider, tokens, field = name.split("__")
        for entry in new["records"]:
            if entry["provider"].replace("-", "_") == provider and entry["length"] == int(tokens):
                entry[field] = value
    return new


def test_each_clock_and_provider_is_compared_by_itself():
    """5 % and less are no change; the largest change comes first."""
    new = changed(frozen__512__median=1.049, fused_bora__512__graph_median=2.1, fused_bora__1000__median=6.0)
    new["records"][4]["first"] = 4.0
    new["records"].append(record("fused-bora", tokens=2048, median=9.0))  # a case that is new
    found = compare(BEFORE, new)
    assert [(c.provider, c.clock) for c in found.slower] == [("fused-bora", "step"), ("fused-bora", "CUDA graph")]
    assert [c.ratio for c in found.slower] == pytest.approx([1.5, 2.1 / 1.9])
    assert [(c.clock, c.before, c.after) for c in found.faster] == [("first call", 13.0, 4.0)]
    assert not found.lost and found.compared == 9
    text = str(found)
    assert "1.50×  layer, step: 96×48, 1000 tokens, r = 4, bf16: fused-bora, step, 4000.000 → 6000.000 ms" in text
    assert "slower: 2" in text and "faster: 1" in text and "not measured any more: none" in text


def test_the_limit_is_the_same_both_ways():
    assert not compare(BEFORE, changed(frozen__512__median=0.953)).faster
    (faster,) = compare(BEFORE, changed(frozen__512__median=0.951)).faster
    (back,) = compare(changed(frozen__512__median=0.951), BEFORE).slower
    assert faster.ratio * back.ratio == pytest.approx(1.0)


def test_what_is_not_measured_any_more_is_told():
    new = changed()
    del new["records"][0]
    new["records"][0] |= {"status": "failed", "reason": "y is off", "median": None}
    found = compare(BEFORE, new)
    assert len(found.lost) == 4  # three clocks of one, one of the other
    assert sum("frozen" in line and "(missing)" in line for line in found.lost) == 3
    assert sum("fused-bora, step (y is off)" in line for line in found.lost) == 1
    new["records"] = [entry for entry in new["records"] if entry["length"] == 1000]  # cases that were not asked for
    assert not compare(BEFORE, new).lost


@pytest.mark.parametrize(
    "new, status, said",
    [
        (changed(), 0, "slower: none"),
        (changed(fused_bora__1000__median=3.0), 0, "faster: 1"),
        (changed(fused_bora__1000__median=5.0), 1, "slower: 1"),
        (changed(fused_bora__1000__median=None), 1, "not measured any more: 1"),
        (result(*BEFORE["records"], device="another"), 2, "same device, got a device and another"),
        (result(record("frozen", tokens=3, median=1.0)), 2, "cases in common"),
    ],
    ids=["same", "faster", "slower", "lost", "devices", "cases"],
)
def test_command(tmp_path, capsys, new, status, said):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, content in zip(paths, (BEFORE, new), strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    assert report.main([*map(str, paths), "--compare"]) == status
    assert said in "".join(capsys.readouterr())
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # nothing is written


def test_command_with_other_files(tmp_path, capsys):
    path = tmp_path / "before.json"
    path.write_text(json.dumps(BEFORE), encoding="utf-8")
    assert report.main([str(path), "--compare"]) == 2
    assert "two results, got 1" in capsys.readouterr().err
    assert report.main([str(path), str(tmp_path / "none.json"), "--compare"]) == 2
