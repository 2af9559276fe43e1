"""The documentation site builds without a warning, has all public names, and needs nothing from elsewhere."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("mkdocstrings_handlers.python", reason="needs the extra docs")

ROOT = Path(__file__).parents[1]
PARTS = ("docs", "benchmarks", "bora_kernels", "examples", "mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def build(source: Path, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "page, module",
    [
        ("package", "bora_kernels"),
        ("functions", "bora_kernels.functional"),
        ("quantized", "bora_kernels.quantized"),
        ("serving", "bora_kernels.serving"),
        ("distributed", "bora_kernels.distributed"),
        ("analysis", "bora_kernels.analysis"),
        ("integrations", "bora_kernels.integrations.peft"),
    ],
)
def test_public_names_have_an_entry(site, page, module):
    if module.endswith("peft"):
        pytest.importorskip("peft")
    html = (site / "docs" / "api" / page / "index.html").read_text(encoding="utf-8")
    names = getattr(importlib.import_module(module), "__all__", ["bora_linear", "bora_embedding", "bora_conv"])
    missing = [name for name in names if name[0] != "_" and f'id="{module}.{name}"' not in html]
    assert not [name for name in missing if name != "reference"]  # a module, on another page


def test_arguments_errors_and_equations_are_there(site):
    text = re.sub(r"<[^>]+>", "", (site / "docs" / "api" / "functions" / "index.html").read_text(encoding="utf-8"))
    for words in ("Parameters:", "Raises:", "[..., N]", "magnitude_col", "bora_weight_ref"):
        assert words in text, words
    equations = (site / "docs" / "api" / "equations" / "index.html").read_text(encoding="utf-8")
    assert all(f"({number})" in equations for number in range(1, 12))


def test_nothing_is_fetched_from_elsewhere(site):
    """Scripts, styles, images and fonts are the site's own; links that a reader follows may lead away."""
    fetched = re.compile(
        r"""<(?:script|img|link|iframe)\b[^>]*(?:src|href)=["'](?:https?:)?//|url\(["']?(?:https?:)?//|@import"""
    )
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > 20
    assert not [path for path in files if fetched.search(path.read_text(encoding="utf-8"))]


def test_broken_links_and_references_fail(tmp_path):
    for part in PARTS:
        path = ROOT / part
        ignored = shutil.ignore_patterns("__pycache__", "*.json")
        shutil.copytree(path, tmp_path / part, ignore=ignored) if path.is_dir() else shutil.copy(path, tmp_path / part)
    with (tmp_path / "docs" / "guide.md").open("a", encoding="utf-8") as guide:
        guide.write("\n[a](nothing.md) [b](serving.md#nothing) [c][bora_kernels.nothing]\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for lost in ("'nothing.md'", "serving.md#nothing", "'bora_kernels.nothing'"):
        assert lost in done.stderr, done.stderr
