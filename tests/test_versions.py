"""The versions that the project says it works with, in its files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENT = re.compile(r"([a-z][a-z0-9-]*)>=([0-9.]+)")


def release(version: str) -> tuple[int, ...]:
    """A version for comparing: trailing zeros do not count."""
    return tuple(map(int, version.removesuffix(".0").removesuffix(".0").split(".")))


def test_oldest_versions_are_the_lower_bounds():
    """``make test-oldest`` runs what pyproject.toml promises: each library of its extras at its lower bound."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = {name: release(version) for name, version in REQUIREMENT.findall(project)}
    pins = dict(line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if "==" in line)
    found = {name: release(version)[: len(bounds[name])] for name, version in pins.items()}
    assert found == {name: bounds[name] for name in pins}
    assert {"torch", "triton", "peft", "transformers", "bitsandbytes", "torchao"} <= pins.keys()


def test_extras_repeat_one_bound():
    """A library has the same lower bound wherever pyproject.toml names it."""
    bounds: dict[str, set[str]] = {}
    for name, version in REQUIREMENT.findall((ROOT / "pyproject.toml").read_text(encoding="utf-8")):
        bounds.setdefault(name, set()).add(version)
    assert {name: versions for name, versions in bounds.items() if len(versions) > 1} == {}
