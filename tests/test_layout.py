"""How the package's modules stand to each other: the import graph, drawn from the sources, imports in functions too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bora_kernels

ROOT = Path(bora_kernels.__file__).parent
# From the bottom up: a module imports from its own line and those below, never from above.
LEVELS = (
    ("_version", "contract", "reference", "rounding"),
    ("replay",),
    ("kernels",),
    ("quantized",),
    ("ops",),
    ("functional",),
    ("modules",),
    ("adapters", "distributed"),
    ("bora_kernels",),
    ("integrations", "demo"),
    ("analysis",),
)


def modules() -> dict[str, Path]:
    """The package's modules by name; a folder's ``__init__`` has the folder's."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ["bora_kernels", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that this one imports, anywhere in its source."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            submodules = {f"{source}.{alias.name}" for alias in node.names} & known.keys()
            # `from . import a, b` of submodules alone needs nothing that the folder's own file holds
            targets |= submodules if len(submodules) == len(node.names) else submodules | {source}
    return (targets & known.keys()) - {name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, path, known) for name, path in known.items()}


def level(name: str) -> int:
    part = name.removeprefix("bora_kernels.").split(".")[0]
    return next(number for number, parts in enumerate(LEVELS) if part in parts)


def test_every_module_has_a_level():
    names = {name.removeprefix("bora_kernels.").split(".")[0] for name in modules()}
    assert names == {part for parts in LEVELS for part in parts}


def test_no_import_runs_upward():
    upward = [(name, target) for name, targets in graph().items() for target in targets if level(target) > level(name)]
    assert not upward


def test_no_import_circle():
    try:
        order = list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) > 30


def test_neighbours_on_one_level_do_not_import_each_other():
    """Folders that share a line of LEVELS stand beside each other, and each could be taken away alone."""

    def part(name: str) -> str:
        return name.removeprefix("bora_kernels.").split(".")[0]

    aside = [
        (name, target)
        for name, targets in graph().items()
        for target in targets
        if level(name) == level(target) and part(name) != part(target)
    ]
    assert not aside
