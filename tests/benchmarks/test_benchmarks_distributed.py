"""The benchmark of several devices, on CPUs: what it records, refuses and prints."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.distributed import launch

from benchmarks import collectives, distributed, records, report, verify
from benchmarks.collectives import Kernel

PROVIDERS = ["frozen", "peft-dora", "fused-bora"]


def run_session(folder: str, providers: list[str], nothing_is_right: bool = False) -> list[dict]:
    """The records of a run in a process group that is there already."""
    if nothing_is_right:
        distributed.TOLERANCE["fp32"] = verify.FLOOR_DEEP = -1.0
    arguments = ["--device=cpu", "--layers=1", "--batch=2", "--length=16", "--rank=4", "--steps=3"]
    options = distributed.parse([*arguments, f"--providers={','.join(providers)}", f"--results={folder}"])
    with contextlib.redirect_stderr(io.StringIO()):  # tracebacks of what fails
        return distributed.Session(torch.device("cpu"), options).run()


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("results")
    launch(run_session, 2, str(folder), PROVIDERS)
    (path,) = folder.glob("*.json")  # the first rank writes it
    return path


def test_every_strategy_and_provider_is_recorded(result: Path) -> None:
    loaded = records.load(result)
    assert loaded["environment"]["device"].startswith("2 × ") and loaded["environment"]["layers"] == 1
    found = {(record["mode"], record["provider"]): record for record in loaded["records"]}
    assert list(found) == [(strategy, name) for strategy in distributed.STRATEGIES for name in PROVIDERS]
    skipped = found.pop(("tp", "peft-dora"))
    assert skipped["status"] == "skipped" and "DTensor" in skipped["reason"] and "median" not in skipped
    for (strategy, name), record in found.items():
        assert record["status"] == "measured" and record["rounds"] == 3
        assert record["median"] > 0 and record["gpus"] == (1 if strategy == "single" else 2)
        tokens = 2 * 16 / (2 if strategy == "tp" else 1)
        assert record["tokens_per_gpu"] == pytest.approx(tokens / record["median"])
        kinds = {"y", "dx"} if name == "frozen" else {"y", "dx", "d_lora_A", "d_lora_B", "d_magnitude_row"}
        assert kinds <= record["errors"].keys() if strategy == "fsdp" else record["error_ratio"] < 8


def test_messages_are_counted_by_kind(result: Path) -> None:
    sent = {(r["mode"], r["provider"]): r.get("messages") for r in records.load(result)["records"]}
    assert sent["single", "frozen"] is None
    frozen, bora = sent["tp", "frozen"], sent["tp", "fused-bora"]
    assert bora["activations"] == frozen["activations"] == {"count": 7, "bytes": 7 * 2 * 16 * 256 * 4}
    assert bora["norms"] == {"count": 14, "bytes": 14 * 256 * 4}  # squares, and D or S, of each layer
    assert bora["factors"] == {"count": 7, "bytes": 7 * 4 * 256 * 4}
    gathers = {kind: message["count"] for kind, message in sent["fsdp", "fused-bora"].items()}
    assert gathers == {"allgather_base": 3, "reduce_scatter_base": 1}


def test_table_has_a_row_for_each_record(result: Path, capsys: pytest.CaptureFixture) -> None:
    assert distributed.main(["--table", str(result)]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(distributed.STRATEGIES) * len(PROVIDERS)
    assert sum("skipped: RuntimeError" in row for row in rows) == 1
    assert "FSDP2 step over frozen's" in text and "GiB" not in text  # nobody weighs on the CPU
    assert "model, tp: tiny" in report.markdown(records.load(result))  # the other report takes it as well


def test_table_says_what_became_of_the_goals(result: Path) -> None:
    """From figures as GPUs give them."""
    loaded = json.loads(result.read_text(encoding="utf-8"))
    times = {"frozen": 0.1, "peft-dora": 0.2, "fused-bora": 0.115}
    for record in loaded["records"]:
        if "median" in record:
            median = times[record["provider"]]
            record |= {"median": median, "tokens_per_gpu": 1e4, "model_bytes": 2**30, "peak_bytes": 2**31}
        if (record["mode"], record["provider"]) == ("tp", "fused-bora"):
            record["messages"]["norms"]["transfer"] = 0.00230
    text = distributed.markdown(loaded)
    assert "| 1.15 |" in text and "| 1.00 | 2.00 |" in text and "| 2300 (2.00%) |" in text
    assert "- FSDP2 step over frozen's: 1.150, at most 1.20 wanted: met" in text
    assert "- norms' messages over the step: 0.020, at most 0.01 wanted: missed" in text


def test_wrong_result_is_not_timed(tmp_path: Path) -> None:
    reasons = {"single": "computes a wrong result: y", "fsdp": "is off what it computes alone: y by"}
    for measured in launch(run_session, 2, str(tmp_path), ["frozen"], True):
        assert [record["mode"] for record in measured] == list(distributed.STRATEGIES)
        for record in measured:
            assert record["status"] == "failed" and "median" not in record
            assert f"WrongResult: frozen {reasons.get(record['mode'], reasons['single'])}" in record["reason"]


def fail_on_rank_1() -> str:
    def act() -> None:
        if dist.get_rank() == 1:
            raise ValueError("no luck")

    with pytest.raises((ValueError, RuntimeError)) as error:
        collectives.together(act)
    return f"{error.type.__name__}: {error.value}"


def test_what_raises_on_one_rank_raises_on_all() -> None:
    assert launch(fail_on_rank_1, 2) == ["RuntimeError: rank 1: ValueError: no luck", "ValueError: no luck"]


def send_two_messages() -> dict:
    """As on GPUs, whose kernels are made up: the second rank comes late to the first message."""
    first = {0: 0.5, 1: 0.125}[dist.get_rank()]
    steps = [
        [Kernel(t, t + first, "ncclA"), Kernel(t + 1, t + 1.25, "ncclB"), Kernel(t + 1.125, t + 2, "gemm")]
        for t in (0.0, 4.0)
    ]
    collectives.kernels = lambda step, device: [*steps[0], *steps[1]]

    def step() -> None:
        for size in (8, 2):
            dist.all_reduce(torch.zeros(size))

    return collectives.communication(step, torch.device("cuda"), lambda name, size: f"{name} {size}")


def test_time_of_messages() -> None:
    expected = {
        "messages": {
            "allreduce 8": {"count": 1, "bytes": 32, "transfer": 0.125},
            "allreduce 2": {"count": 1, "bytes": 8, "transfer": 0.25},
        },
        "communication": 0.75,
        "exposed": 0.625,
        "transfer": 0.375,
    }
    assert launch(send_two_messages, 2) == [expected] * 2


def test_time_alone() -> None:
    some = [Kernel(0, 2, ""), Kernel(1, 3, ""), Kernel(8, 9, "")]
    assert collectives.alone(some, [Kernel(2.5, 4, ""), Kernel(5, 6, "")]) == 3.5
    assert collectives.alone(some, []) == 4 and collectives.alone([], some) == 0


def test_command_asks_for_torchrun(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delitem(os.environ, "RANK", raising=False)
    with pytest.raises(SystemExit):
        distributed.main([])
    assert "torchrun --nproc-per-node 2 -m benchmarks.distributed" in capsys.readouterr().err
