"""The benchmarks' report: right ratios, whole cases merged, and no other files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import records, report


def _record(provider: str, tokens: int, ms: float | None, mib: int = 0, status: str = "measured") -> dict:
    case = {"level": "layer", "mode": "step", "shape": "64x64", "batch": 1, "length": tokens, "rank": 8}
    record = {**case, "dtype": "bf16", "checkpointing": False, "provider": provider, "title": provider}
    record |= {"status": status, "reason": "off" if status == "failed" else "", "flop": 1e9}
    return record | ({} if ms is None else {"median": ms / 1e3, "peak_bytes": mib * 2**20, "error_ratio": 1.0})


@pytest.fixture
def result(tmp_path: Path) -> Path:
    rows = []
    for tokens in (128, 256):
        rows += [
            _record("frozen", tokens, 1.0, 100),
            _record("peft-lora", tokens, 2.0, 150),
            _record("peft-lora-half", tokens, 1.6, 200),
            _record("lora-by-hand", tokens, 1.8, 120),
            _record("lora-by-hand-half", tokens, 1.5, 160),
            _record("peft-dora", tokens, None, status="failed"),
            _record("peft-dora-half", tokens, 3.0, 400),
            _record("fused-bora", tokens, 1.2, 120),
        ]
    environment = {"date": "2000-01-01", "device": "a device", "cpu": "a CPU", "system": "an OS", "clock": "a clock"}
    environment |= {"commit": "abc", "versions": {"torch": "1.2"}}
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"environment": environment, "gemm_tflops": {"bf16": 2.0}, "records": rows}))
    return path


def _cells(text: str, provider: str) -> list[str]:
    """The provider's row in the first table of "Every case"."""
    lines = text.partition("## Every case")[2].splitlines()
    return [
        cell.strip() for cell in next(line for line in lines if line.startswith(f"| {provider} |")).split("|")[2:-1]
    ]


def test_report_ratios(result: Path) -> None:
    text = report.markdown(records.load(result))
    # ms, ktokens/s, TFLOP/s, of GEMM, MiB; time over frozen, LoRA, LoRA by hand, the DoRA that ran; memory
    assert _cells(text, "fused-bora") == "1.200 107 0.833 42% 120 1.20 0.75 0.80 0.40 1.20 0.80 1.00 0.30 1.00".split()
    assert _cells(text, "frozen")[5:9] == ["1.00", "0.62", "0.67", "0.33"]
    assert _cells(text, "peft-dora")[0] == "failed: off"
    assert "1.200 · 120 (1.20×)" in text  # the summary
    for fact in ("a device", "a CPU", "torch 1.2", "commit abc", "a clock", "bf16 2 TFLOP/s"):
        assert fact in text, fact


def test_report_command(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "report"
    assert report.main([str(result), "--output", str(folder)]) == 0
    assert (folder / "report.md").read_text(encoding="utf-8") == capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "tokens.png").stat().st_size > 1000
        assert not (folder / "rank.png").exists()  # one rank makes no chart


def test_report_shows_the_graph_beside_the_frozen_layer(result: Path) -> None:
    loaded = records.load(result)
    for record in loaded["records"]:
        if record["provider"] in ("frozen", "fused-bora") and record["length"] == 128:
            record["graph_median"] = 9e-4
    header, _, row, other = report.summary(records.by_case(loaded["records"]), "layer").splitlines()[2:]
    assert header.endswith("FusedBoraLinear as a CUDA graph |")
    assert row.endswith("| 0.900 (0.90×) |") and other.endswith("|  |")


def test_report_shows_the_step_on_an_idle_device(result: Path) -> None:
    loaded = records.load(result)
    for record in loaded["records"]:
        if record["provider"] == "fused-bora":
            record["idle_median"] = 1.7e-3
    text = report.markdown(loaded)
    assert _cells(text, "fused-bora")[:3] == ["1.200", "1.700", "107"]
    assert _cells(text, "frozen")[:3] == ["1.000", "", "128"]


def test_report_merges_whole_cases(result: Path, tmp_path: Path) -> None:
    """The second result's case replaces the first's; nothing is put together from two processes."""
    second = records.load(result)
    second["records"] = [_record("frozen", 256, 2.0), _record("fused-bora", 512, 3.0)]
    second["environment"]["date"] = "2000-01-02"
    second["gemm_tflops"] = {"bf16": 3.0, "fp32": 1.0}
    other, merged = tmp_path / "other.json", tmp_path / "merged.json"
    other.write_text(records.to_json(second), encoding="utf-8")
    assert report.main([str(result), str(other), "--merged", str(merged)]) == 0
    assert (tmp_path / "merged" / "report.md").exists()
    cases = records.by_case(records.load(merged)["records"])
    medians = {key[4]: {name: record.get("median") for name, record in case.items()} for key, case in cases.items()}
    assert len(medians[128]) == 8 and medians[256] == {"frozen": 2e-3} and medians[512] == {"fused-bora": 3e-3}
    assert records.load(merged)["environment"]["date"] == "2000-01-01; 2000-01-02"
    assert records.load(merged)["gemm_tflops"] == {"bf16": 2.0, "fp32": 1.0}


def test_report_refuses_results_of_two_commits(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    second = records.load(result)
    second["environment"]["commit"] = "def"
    other = tmp_path / "other.json"
    other.write_text(records.to_json(second), encoding="utf-8")
    assert report.main([str(result), str(other)]) == 1
    assert "same commit, got abc and def" in capsys.readouterr().err


def test_report_of_results_without_bases(result: Path) -> None:
    """A recorded result says nothing of bases; a 4-bit case is named as one."""
    loaded = records.load(result)
    loaded["records"].append({**_record("frozen", 128, 1.0), "base": "nf4"})
    text = report.markdown(loaded)
    assert "step: 64×64, 128 tokens, r = 8, bf16\n" in text
    assert "step: 64×64, 128 tokens, r = 8, bf16, nf4 base\n" in text


def test_report_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert report.main([str(path)]) == 1
    assert "not a result" in capsys.readouterr().err
