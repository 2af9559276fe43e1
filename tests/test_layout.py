"""How modules stand to each other: the import graph, drawn from the sources, imports in functions too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up: a module imports from its own line and those below, never from above.
LEVELS = {
    "bora_kernels": (
        ("_private",),
        ("_library", "_version", "contract", "reference", "rounding"),
        ("replay",),
        ("kernels",),
        ("quantized",),
        ("ops",),
        ("functional", "blocks", "merging"),
        ("modules",),
        ("serving",),
        ("fusion",),
        ("adapters", "distributed"),
        ("bora_kernels",),
        ("integrations",),
        ("analysis",),
    ),
    "benchmarks": (
        ("benchmarks", "by_hand", "cases", "collectives", "communication", "liger", "measure", "records"),
        ("charts", "compare", "models", "readme"),
        ("adapting", "report"),
        ("providers",),
        ("verify",),
        ("harness", "sharding"),
        ("sweep",),
        ("conftest", "distributed", "serving", "test_layer", "test_model", "test_sweep"),
        ("quality",),
    ),
}
each_package = pytest.mark.parametrize("package", LEVELS)


def modules(package: str) -> dict[str, Path]:
    """The package's modules by name; a folder's ``__init__`` has the folder's."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
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


def graph(package: str) -> dict[str, set[str]]:
    known = modules(package)
    return {name: imported(name, path, known) for name, path in known.items()}


def part(name: str) -> str:
    """The part of its package that a module belongs to: a file or folder of its own line in LEVELS."""
    return name.split(".")[min(1, name.count("."))]


def level(name: str) -> int:
    levels = LEVELS[name.split(".")[0]]
    return next(number for number, parts in enumerate(levels) if part(name) in parts)


@each_package
def test_every_module_has_a_level(package):
    assert {part(name) for name in modules(package)} == {part for parts in LEVELS[package] for part in parts}


@each_package
def test_no_import_runs_upward(package):
    arrows = [(name, target) for name, targets in graph(package).items() for target in targets]
    assert not [(name, target) for name, target in arrows if level(target) > level(name)]


@each_package
def test_no_import_circle(package):
    try:
        order = list(TopologicalSorter(graph(package)).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) > 15


@each_package
def test_neighbours_on_one_level_do_not_import_each_other(package):
    """Parts that share a line of LEVELS stand beside each other, and each could be taken away alone."""
    arrows = [(name, target) for name, targets in graph(package).items() for target in targets]
    assert not [(a, b) for a, b in arrows if level(a) == level(b) and part(a) != part(b)]


def test_modules_of_tests_have_names_of_their_own():
    """Ranks of a process group import a test's function by its module's name, and folders are no packages."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
