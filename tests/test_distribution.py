"""What is shipped: a wheel with the package alone, an sdist that can run its own tests and whose links resolve."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools", reason="building needs setuptools: pip install -e '.[dev]'")

ROOT = Path(__file__).parents[1]
_HIDDEN = (".ci", ".pre-commit-config.yaml")  # of the hidden files those that are shipped


def _local(folder: str, names: list[str]) -> list[str]:
    """What is no part of the sources: environments, caches, builds."""
    built = {"build", "dist", "__pycache__", "demo_output"}
    hidden = [name for name in names if name.startswith(".") and name not in _HIDDEN]
    return hidden + [name for name in names if name in built or name.endswith((".egg-info", ".whl"))]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources, since building leaves files behind."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "root", ignore=_local))


def build(source: Path, kind: str) -> Path:
    command = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", command], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return source / "dist" / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_sdist_runs_its_own_tests(source, tmp_path):
    with tarfile.open(build(source, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    tests = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")}
    assert tests == {path.relative_to(root) for path in (root / "tests").rglob("*.py")}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *arguments]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=kept)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    collected = run("--collect-only", "tests")
    assert int(re.search(r"(\d+) tests collected", collected)[1]) > 1000
    run("tests/test_documents.py", "tests/test_layout.py")  # links resolve in what is shipped, and the table is there


def test_wheel_holds_the_package_alone(source):
    with zipfile.ZipFile(build(source, "wheel")) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"bora_kernels"}
    assert "bora_kernels/py.typed" in names and "bora_kernels/kernels/gemm.py" in names
    assert "\nAuthor: the bora_kernels authors\n" in metadata and "Author-email" not in metadata


def test_hooks_have_the_tested_version_of_ruff():
    tested = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    assert set(re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())) == {tested}
