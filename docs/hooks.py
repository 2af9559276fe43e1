"""What the documentation site is made of: the documents where they are, and the files that they link to."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md", "study/**/*.md")
_LINK = re.compile(r"\]\((?!\w+:)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's files by their places in the repository, so that links between them are right as they stand."""
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    linked = {(page.parent / target).resolve() for page in pages for target in links(page)}
    chosen = sorted(pages | {path for path in linked if path.is_file() and path.is_relative_to(ROOT)})
    names = (path.relative_to(ROOT).as_posix() for path in chosen)
    return Files([File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names])


def links(page: Path) -> list[str]:
    """The files that a document links to."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return _LINK.findall(prose)
