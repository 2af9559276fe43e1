"""Replays turned off: by the context manager, by the environment variable, by hooks on Triton's launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
from helpers.fake_driver import Kernel, chain, check

pytest.importorskip("triton", reason="needs triton")

import bora_kernels
from bora_kernels.replay import compiled, replay_disabled


def test_replay_disabled(driver):
    """Scopes nest and overlap; afterwards the recording of before goes on."""
    assert bora_kernels.replay_disabled is replay_disabled
    run, calls = chain(Kernel(driver))
    check(run, times=2)
    first, second = replay_disabled(), replay_disabled()
    first.__enter__()
    with replay_disabled():
        check(run)
    check(run)
    second.__enter__()
    first.__exit__(None, None, None)
    check(run)
    second.__exit__(None, None, None)
    assert len(calls) == 4 and len(driver.launches) == 3
    check(run)
    assert len(calls) == 4 and len(driver.launches) == 6


def test_replay_disabled_ends_with_an_exception_and_decorates(driver):
    run, calls = chain(Kernel(driver))
    check(run)
    with pytest.raises(KeyError), replay_disabled():
        raise KeyError
    replay_disabled()(check)(run)
    assert len(calls) == 2
    check(run)
    assert len(calls) == 2


def test_replay_disabled_holds_for_other_threads(driver):
    run, calls = chain(Kernel(driver))
    check(run)
    with replay_disabled():
        thread = threading.Thread(target=check, args=(run,))
        thread.start()
        thread.join()
    assert len(calls) == 2 and not driver.launches


IMPORTS = """
import importlib, json, os, torch
from bora_kernels.replay import switch

found = []
for value in ("0", "1", "", None, "off"):
    os.environ.pop("BORA_KERNELS_REPLAY", None)
    if value is not None:
        os.environ["BORA_KERNELS_REPLAY"] = value
    try:
        found.append(importlib.reload(switch).off)
    except ValueError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_the_environment_variable():
    """It is read when the module is imported; in a process of its own, which imports it again for each value."""
    environment = {k: v for k, v in os.environ.items() if k != "BORA_KERNELS_REPLAY"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True, check=True)
    *found, refusal = json.loads(done.stdout)
    assert found == [True, False, False, False]
    assert refusal == "BORA_KERNELS_REPLAY must be 0 (launches are not replayed) or 1, got 'off'"


# ---- hooks ----


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_see_every_launch(driver, which):
    """As Proton installs them, and in the older way; without a hook replays go on."""
    from triton import knobs

    def hook(metadata):
        pass

    run, calls = chain(Kernel(driver))
    check(run, times=2)
    getattr(knobs.runtime, which).add(hook)
    try:
        check(run, times=2)
        assert len(calls) == 3
    finally:
        getattr(knobs.runtime, which).remove(hook)
    chained = getattr(knobs.runtime, which)
    try:
        setattr(knobs.runtime, which, hook)
        check(run)
        assert len(calls) == 4
        setattr(knobs.runtime, which, None)
        check(run)
    finally:
        setattr(knobs.runtime, which, chained)
    check(run)
    assert len(calls) == 4 and not compiled.hooked()
