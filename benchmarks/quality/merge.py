"""Files of runs that were made side by side, as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .session import key_of, write_runs


def merge(paths: Sequence[Path], out: Path) -> int:
    """Write the runs of all files to ``out``, each once, in the order of the files; returns how many.

    The same session in several files, as where one began as a copy of another, stays one session. Raises ValueError,
    before anything is written, where two files have the same run with another result, and where runs on made-up data
    would come together with others.
    """
    sessions: list[dict] = []
    records: dict[tuple, dict] = {}
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        places = []
        for session in content["sessions"]:
            if session not in sessions:
                sessions.append(session)
            places.append(sessions.index(session))
        for record in content["records"]:
            moved = record | {"session": places[record["session"]]}
            known = records.setdefault(key_of(record), moved)
            if known != moved:
                what = ", ".join(f"{name} {record[name]}" for name in ("stage", "task", "method", "seed", "lr"))
                raise ValueError(f"files must agree on runs that they share, got two results of {what} ({path})")
    if len({bool(session.get("small")) for session in sessions}) > 1:
        raise ValueError("files must be all of small runs or none, got both")
    write_runs(out, sessions, list(records.values()))
    return len(records)
