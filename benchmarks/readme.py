"""The README's table, made from recorded results: ``python -m benchmarks.report RESULT.json ... --readme README.md``.

It stands between two comments, of which the first names the results; a test makes it again and compares. Of several
results of one device and the same versions, say layers from one and models from another, the last with a case counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .records import CASE_FIELDS, by_case, load

_LAYER = ("layer", "step", "4096x4096", 1, 8192, 16, "bf16", False, "dense")
_MODEL = ("model", "step", "llama3-8b", 4, 2048, 16, "bf16", False, "dense")
_COLUMNS = (
    ("4096 × 4096 layer, ms", _LAYER, "median", 1e3),
    ("MiB", _LAYER, "peak_bytes", 2**-20),
    ("four Llama-3-8B layers, ms", _MODEL, "median", 1e3),
    ("MiB", _MODEL, "peak_bytes", 2**-20),
)
_ROWS = {
    "frozen": "no adapter",
    "peft-lora-half": "LoRA, PEFT",
    "lora-by-hand-half": "LoRA, fused by hand",
    "peft-dora-half": "DoRA, PEFT",
    "dense-bora": "BoRA, its formula in PyTorch",
    "fused-dora": "**DoRA, `FusedDoraLinear`**",
    "fused-bora": "**BoRA, `FusedBoraLinear`**",
    "peft-lora-fuse": "**LoRA, PEFT after `fuse`**",
    "peft-dora-fuse": "**DoRA, PEFT after `fuse`**",
    "fused-bora-fuse": "**BoRA, `FusedBoraLinear` after `fuse`**",
}
_COMPARED = ("torch", "triton", "peft")  # libraries that the caption names
_MARKED = re.compile(r"<!-- made from (\S+(?: \S+)*) -->\n.*?<!-- end -->", re.DOTALL)


def text(results: Sequence[dict]) -> str:
    """The table and what was measured: one figure a cell, the fastest setting of each peer.

    Raises ValueError for results of different devices or versions.
    """
    environment = results[0]["environment"]
    cases: dict[tuple, dict[str, dict]] = {}
    for result in results:
        for name in ("device", *_COMPARED):
            known, found = _fact(environment, name), _fact(result["environment"], name)
            if known != found:
                raise ValueError(f"results must have the same {name}, got {known} and {found}")
        cases |= by_case(result["records"])
    commits = dict.fromkeys(result["environment"]["commit"][:7] for result in results)
    versions = environment["versions"]
    lines = ["| | " + " | ".join(column[0] for column in _COLUMNS) + " |", "|---|" + "---:|" * len(_COLUMNS)]
    for provider, name in _ROWS.items():
        records = [(cases.get(case, {}).get(provider, {}), field, scale) for _, case, field, scale in _COLUMNS]
        if not any(record.get("median") for record, *_ in records):
            continue
        cells = [_cell(record.get(field), scale) for record, field, scale in records]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    length, rank, dtype = (_LAYER[CASE_FIELDS.index(field)] for field in ("length", "rank", "dtype"))
    caption = (
        "Time of a training step (forward and backward), and the most memory that it takes beside the weights.\n"
        f"{length} tokens, rank {rank}, {dtype} base, {environment['device']}, PyTorch {versions['torch']}, "
        f"Triton {versions['triton']}, PEFT {versions['peft']}.\n"
        f"The peers' adapters are in {dtype}, their faster setting, this package's in float32."
        + f"\nMeasured at commits {' and '.join(commits)}."
        * (len(commits) > 1)
    )
    return caption + "\n\n" + "\n".join(lines)


def _cell(value: float | None, scale: float) -> str:
    if value is None:
        return "–"
    value *= scale
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def sources(readme: Path) -> list[Path]:
    """The results that the README's table is made from."""
    return [readme.parent / name for name in _marked(readme)[1].split()]


def write(readme: Path, results: Sequence[Path]) -> None:
    """Put the table of results that lie below the README's folder into the README."""
    _marked(readme)
    names = [path.resolve().relative_to(readme.resolve().parent).as_posix() for path in results]
    table = f"<!-- made from {' '.join(names)} -->\n{text([load(path) for path in results])}\n<!-- end -->"
    readme.write_text(_MARKED.sub(lambda _: table, readme.read_text(encoding="utf-8")), encoding="utf-8")


def _fact(environment: dict, name: str) -> str:
    return environment["device"] if name == "device" else environment["versions"][name]


def _marked(readme: Path) -> re.Match:
    found = _MARKED.search(readme.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{readme} must hold the comments <!-- made from RESULT --> and <!-- end -->")
    return found
