"""The benchmark of mixed batches, on a CPU: what it records and prints, and that a wrong result has no time."""

import pytest
import torch

from benchmarks import records, serving

ARGUMENTS = ["--device=cpu", "--dtype=fp32", "--shapes=20x24", "--layers=2", "--adapters=3,1"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(serving, "BATCHES", ((5, 1), (2, 7)))


def test_every_batch_is_checked_timed_and_recorded(tmp_path, capsys):
    assert serving.main([*ARGUMENTS, f"--results={tmp_path}", "--commit=abc"]) == 0
    (path,) = tmp_path.glob("*.json")
    result = records.load(path)
    assert result["environment"]["commit"] == "abc" and "torch" in result["environment"]["versions"]
    cases = records.by_case(result["records"])
    assert [key[3:5] for key in cases] == [(5, 1), (2, 7)]
    for case in cases.values():
        assert list(case) == ["frozen", "mixed-3", "mixed-1"] and all(r["median"] > 0 for r in case.values())
        assert all(0 < case[name]["error_ratio"] <= serving.TOLERATED for name in ("mixed-3", "mixed-1"))
    printed = capsys.readouterr().out
    assert "20×24 | 2×7 | 3 adapters" in printed and "commit abc" in printed
    assert serving.main([f"--table={path}"]) == 0
    assert capsys.readouterr().out.strip() in printed


@pytest.mark.parametrize("wrong", ["adapter", "nan"])
def test_a_wrong_result_has_no_time(wrong, tmp_path, monkeypatch, capsys):
    plain = serving.bora_linear_mixed

    def spoiled(x, weight, bank, index, *rest):
        if wrong == "adapter":
            index = bank.index([None] * len(index))
        y = plain(x, weight, bank, index, *rest)
        return y * torch.nan if wrong == "nan" else y

    monkeypatch.setattr(serving, "bora_linear_mixed", spoiled)
    assert serving.main([*ARGUMENTS, f"--results={tmp_path}"]) == 1
    (path,) = tmp_path.glob("*.json")
    for record in records.load(path)["records"]:
        failed = record["provider"] != "frozen"
        assert record["status"] == ("failed" if failed else "measured") and ("median" in record) != failed
    assert "WrongResult: error" in capsys.readouterr().out
