"""Files of runs that were made side by side become one."""

from __future__ import annotations

import json

import pytest

from benchmarks.quality.__main__ import main


def write_file(path, sessions, records):
    path.write_text(json.dumps({"sessions": sessions, "records": records}))
    return path


def made(seed, score, session, **other):
    found = {"stage": "stage2", "variant": "", "task": "swap", "method": "dora", "rank": 4, "seed": seed, "lr": 0.1}
    return found | {"magnitude_factor": 1.0, "test": score, "session": session, **other}


def test_files_of_runs_become_one(tmp_path, capsys):
    """Two that began as copies of one file: its sessions and runs come once, the new ones point to their sessions."""
    old, a, b = ({"date": name} for name in ("old", "a", "b"))
    first = write_file(tmp_path / "a.json", [old, a], [made(1, 5.0, 0), made(2, 6.0, 1)])
    second = write_file(tmp_path / "b.json", [old, b], [made(1, 5.0, 0), made(3, 7.0, 1), made(3, 8.0, 1, rank=2)])
    out = tmp_path / "both" / "c.json"
    assert main(["merge", str(first), str(second), "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["sessions"] == [old, a, b]
    assert content["records"] == [made(1, 5.0, 0), made(2, 6.0, 1), made(3, 7.0, 2), made(3, 8.0, 2, rank=2)]
    assert main(["merge", str(out), str(second), str(first), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == content


@pytest.mark.parametrize(
    ("session", "record", "message"),
    [
        ({"date": "old"}, made(1, 5.5, 0), "two results of stage stage2, task swap, method dora, seed 1, lr 0.1"),
        ({"date": "new"}, made(1, 5.0, 0), "two results"),  # made twice, even if with the same result
        ({"date": "old", "small": True}, made(2, 5.0, 0), "all of small runs or none"),
    ],
)
def test_files_that_contradict_are_not_merged(session, record, message, tmp_path):
    first = write_file(tmp_path / "a.json", [{"date": "old"}], [made(1, 5.0, 0)])
    second = write_file(tmp_path / "b.json", [session], [record])
    with pytest.raises(ValueError, match=message):
        main(["merge", str(first), str(second), "--out", str(tmp_path / "c.json")])
    assert not (tmp_path / "c.json").exists()
