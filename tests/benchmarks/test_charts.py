"""Charts that a stranger can read: names, numbers, the machine; nothing on top of something else."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("matplotlib", reason="charts need matplotlib")

from matplotlib.figure import Figure  # noqa: E402

from benchmarks import charts  # noqa: E402
from benchmarks.models import STACKS  # noqa: E402

TIMES = {"frozen": 3.0, "peft-lora-half": 5.01, "lora-by-hand-half": 4.4, "peft-dora-half": 9.0, "fused-bora": 5.0}
TIMES["dense-bora"] = 123.4
ENVIRONMENT = {"device": "Some GPU 3000", "date": "2001-02-03 04:05 UTC", "versions": {"torch": "9.8", "peft": "0.7"}}


def record(provider: str, ms: float, level: str = "layer", shape: str = "48x64", **case) -> dict:
    case = {"batch": 2, "length": 64, "rank": 8, "checkpointing": False, "base": "dense"} | case
    measured = {"median": ms / 1e3, "peak_bytes": int(ms * 2**20)}
    return {"level": level, "mode": "step", "shape": shape, "dtype": "bf16", "provider": provider} | case | measured


@pytest.fixture
def figures(monkeypatch, tmp_path) -> dict[str, Figure]:
    """What is drawn of a result with three lengths, two ranks, two shapes and a model, by the file's name."""
    cases = [{"length": length} for length in (64, 128, 4096)] + [{"rank": 32}, {"shape": "96x64"}]
    records = [record(name, ms, **case) for case in cases for name, ms in TIMES.items()]
    for case in ({}, {"checkpointing": True}, {"base": "nf4"}):
        records += [record(name, 7 * ms, "model", "llama3-8b", **case) for name, ms in TIMES.items()]
    records.append(record("frozen", 1.0) | {"mode": "inference", "median": None})
    found = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: found.update({path.name: self}))
    result = {"environment": ENVIRONMENT, "gemm_tflops": {}, "records": records}
    assert charts.draw(result, tmp_path) == list(found) == ["tokens.png", "rank.png", "shape.png", "models.png"]
    for figure in found.values():
        figure.draw_without_rendering()
    return found


def texts(figure: Figure) -> list[str]:
    named = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_visible()]
    return [text.get_text() for text in named if text.get_text()]


def test_title_says_what_was_measured_where_and_with_what(figures) -> None:
    for name, figure in figures.items():
        first, second = figure.get_suptitle().splitlines()
        assert "forward and backward" in first and "bf16" in first, name
        assert second == "Some GPU 3000, PyTorch 9.8, PEFT 0.7, 2001-02-03 04:05 UTC"
    assert "48 × 64 (out × in)" in figures["tokens.png"].get_suptitle()


def test_names_not_codes(figures) -> None:
    for name, figure in figures.items():
        shown = texts(figure)
        codes = {*charts._NAMES, *STACKS, "_", "None"} - {"frozen"}  # which is a name, too
        assert not [text for text in shown if any(code in text for code in codes)], name
        assert "PEFT LoRA, bf16 adapter" in shown and "FusedBoraLinear" in shown, name


def test_every_bar_has_its_number(figures) -> None:
    for name, group in (("rank.png", "r = 32"), ("shape.png", "96 × 64 (out × in)")):
        shown = texts(figures[name])
        assert any(text.endswith(group) for text in shown), shown
        for number in ("3.00 ms", "5.01 ms (1.67×)", "9.00 ms (3.00×)", "5.00 MiB (1.67×)"):
            assert shown.count(number) == 2, (name, number)
    shown = texts(figures["models.png"])
    assert shown.count("864 ms (41.13×)") == shown.count("35.0 ms (1.67×)") == 3
    assert sum(text.endswith(("tokens", "tokens, checkpointed", "tokens, NF4 base")) for text in shown) == 3
    bars = sum(len(container) for axes in figures["models.png"].axes for container in axes.containers)
    assert bars == 2 * 3 * len(TIMES) == sum("(" in text or text.endswith((" ms", " MiB")) for text in shown) - 2


def test_numbers_do_not_lie_on_each_other(figures) -> None:
    """Two lines all but coincide; their numbers stand a line apart all the same."""
    for axes in figures["tokens.png"].axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 3 * 5
        assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.shrunk(1, 0.8).overlaps(b.shrunk(1, 0.8))]


def test_models_have_names_that_are_true() -> None:
    assert charts._MODELS.keys() == STACKS.keys()
    assert all(stack.layers == 4 for stack in STACKS.values())  # "Four layers of ..."
