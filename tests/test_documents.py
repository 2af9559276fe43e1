"""Documents say what is there: links resolve, and the README's table is that of the recorded run it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readme, records, report

ROOT = Path(__file__).parents[1]
_ELSEWHERE = ("http://", "https://", "mailto:")
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md", "study/**/*.md")
    for path in ROOT.glob(pattern)
)


def links(text: str) -> list[str]:
    """The targets of a document's links and images that are files or headings of this project."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not target.startswith(_ELSEWHERE)]


def anchors(text: str) -> set[str]:
    """The names by which a document's headings are linked to, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path):
    for target in links(path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert linked.resolve().is_relative_to(ROOT), f"{target} leaves the project"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_links_are_found_where_they_are():
    text = "[a](b.md#c-d), ![e](f.png) and [g\nh](https://i) but `x[j](k)`\n\n```\n[l](m)\n# n\n```\n## C, `D`: e\n"
    assert links(text) == ["b.md#c-d", "f.png"] and anchors(text) == {"c-d-e"}


@pytest.mark.parametrize(
    "name",
    [
        "CONTRIBUTING.md",
        "README.md",
        "docs/guide.md",
        "docs/distributed.md",
        "docs/tensor_parallel.md",
        "docs/compatibility.md",
        "docs/serving.md",
    ],
)
def test_named_files_are_there(name):
    """Paths in code marks, such as ``tests/helpers/accuracy.py``, are those of the repository."""
    code = " ".join(re.findall(r"`([^`\n]+)`", (ROOT / name).read_text(encoding="utf-8")))
    paths = re.findall(r"(?<![\w/.])(?:bora_kernels|tests|benchmarks|examples|docs|study)/[\w./-]*", code)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_readme_leads_to_the_documents():
    reached, open_ = set(), [ROOT / "README.md"]
    while open_:
        path = open_.pop()
        reached.add(path)
        names = [target.partition("#")[0] for target in links(path.read_text(encoding="utf-8"))]
        found = {(path.parent / name).resolve() for name in names if name.endswith(".md")}
        open_ += [target for target in found if target.exists() and target not in reached and target not in open_]
    assert not {path for path in (ROOT / "docs").glob("*.md")} - reached


def test_readme_table_is_that_of_the_recorded_run(tmp_path):
    path = ROOT / "README.md"
    written = path.read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(written, encoding="utf-8")
    results = [tmp_path / source.relative_to(ROOT) for source in readme.sources(path)]
    for source, result in zip(readme.sources(path), results, strict=True):
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_bytes(source.read_bytes())
    readme.write(copy, results)
    assert copy.read_text(encoding="utf-8") == written

    other = records.load(results[0])
    for record in other["records"]:
        record["median"] = record.get("median") and 2 * record["median"]
    results[0].write_text(records.to_json(other), encoding="utf-8")
    readme.write(copy, results)
    assert copy.read_text(encoding="utf-8") != written


def test_readme_table_of_layers_from_one_run_and_models_from_another(tmp_path):
    copy, sources = tmp_path / "README.md", readme.sources(ROOT / "README.md")
    copy.write_text("<!-- made from a.json -->\n<!-- end -->", encoding="utf-8")
    of_readme = [record for path in sources for record in records.load(path)["records"]]
    cells = {key: case["fused-bora"]["median"] for key, case in _cases(of_readme).items()}
    for name, level, factor in (("a.json", "layer", 1), ("b.json", "model", 3)):
        result = records.load(sources[0])
        result["records"] = [dict(record) for record in of_readme if record["level"] == level]
        for record in result["records"]:
            record["median"] = record.get("median") and factor * record["median"]
        result["environment"]["commit"] = name
        (tmp_path / name).write_text(records.to_json(result), encoding="utf-8")
    results = [tmp_path / name for name in ("a.json", "b.json")]
    assert report.main([*map(str, results), "--readme", str(copy)]) == 0
    written = copy.read_text(encoding="utf-8")
    assert "made from a.json b.json" in written and "Measured at commits a.json and b.json." in written
    row = next(line for line in written.splitlines() if "FusedBoraLinear`** |" in line)
    assert row.split("|")[2].strip() == f"{1e3 * cells[readme._LAYER]:.2f}"
    assert row.split("|")[4].strip() == f"{3e3 * cells[readme._MODEL]:.0f}"
    assert readme.sources(copy) == results

    result["environment"]["versions"]["triton"] = "9"
    results[1].write_text(records.to_json(result), encoding="utf-8")
    assert report.main([*map(str, results), "--readme", str(copy)]) == 1
    assert copy.read_text(encoding="utf-8") == written


def _cases(of_readme):
    cases = records.by_case(of_readme)
    return {key: cases[key] for key in (readme._LAYER, readme._MODEL)}


def test_readme_without_a_place_for_the_table_is_refused(tmp_path, capsys):
    other = tmp_path / "README.md"
    other.write_text("nothing", encoding="utf-8")
    assert report.main([str(readme.sources(ROOT / "README.md")[0]), "--readme", str(other)]) == 1
    assert "must hold the comments <!-- made from RESULT -->" in capsys.readouterr().err
    assert other.read_text(encoding="utf-8") == "nothing"


def test_readme_says_which_bora_and_code_comes_early():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before_code = text.partition("```python")[0]
    assert "2412.06441" in before_code and "2508.06953" in before_code and "undecided" in before_code
    assert len(before_code.split()) < 400
