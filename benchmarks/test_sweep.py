"""The layer beside LoRA fused by hand over widths, tokens and ranks, in one test with a progress bar."""

import time

import pytest

from . import sweep
from .records import load


def test_sweep(harness, pytestconfig, capsys) -> None:
    option = pytestconfig.option
    if option.resume is not None:
        sweep.resume(harness, load(option.resume))
        harness.path = option.resume
    chosen = {name: getattr(option, name) for name in ("shapes", "tokens", "ranks", "dtypes")}
    cases = sweep.cases(harness.device.type, **chosen)
    todo, before, began = sweep.left(harness, cases), len(harness.records), time.monotonic()
    done = len(cases) - len(todo)
    with capsys.disabled():
        print(f"\n{len(cases)} cases, {done} measured before; kernels are compiled first", flush=True)
        for case in sweep.run(harness, todo, option.minutes):
            done += 1
            filled = 20 * done // len(cases)
            minutes = f"{(time.monotonic() - began) / 60:.1f}" + (f" of {option.minutes:g}" if option.minutes else "")
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{len(cases)}  {minutes} min"
            print(f"{bar}  {sweep.line(harness.records, case)}", flush=True)
        if done < len(cases):
            print(f"out of time, {len(cases) - done} cases left: --sweep --resume {harness.path}", flush=True)
    failed = [record for record in harness.records[before:] if record["status"] == "failed"]
    if failed:
        pytest.fail(
            f"{len(failed)} of {len(harness.records) - before} measurements failed, see the table", pytrace=False
        )
