"""The format of a result: a session's environment and a record for each case and provider; what tables and charts read.

A file holds ``environment``, ``gemm_tflops`` and ``records``. A case is what CASE_FIELDS say of it.
"""

from __future__ import annotations

import json
from pathlib import Path

CASE_FIELDS = ("level", "mode", "shape", "batch", "length", "rank", "dtype", "checkpointing", "base")
PEERS: dict[
    str, list[tuple[str, ...]]
] = {  # what ratios are to: of several, the fastest (for memory the smallest) of those that were measured
    "frozen": [("frozen",)],
    "LoRA": [("peft-lora", "peft-lora-half")],
    "LoRA by hand": [("lora-by-hand", "lora-by-hand-half")],
    "DoRA": [("peft-dora", "peft-dora-half"), ("dense-dora",)],
}


def to_json(result: dict) -> str:
    """A result as the text of a file, with a line for each record."""
    head = json.dumps({name: value for name, value in result.items() if name != "records"}, indent=1)
    lines = ",\n".join("  " + json.dumps(record, separators=(",", ":")) for record in result["records"])
    return f'{head.removesuffix("}").rstrip()},\n "records": [\n{lines}\n ]\n}}\n'


def merge(results: list[dict]) -> dict:
    """One result of several; a case is that of the last result that has it.

    Raises ValueError for results of different devices, versions or commits. Other facts that differ are listed.
    """
    environment = dict(results[0]["environment"])
    gemm: dict[str, float] = {}
    cases: dict[tuple, dict[str, dict]] = {}
    for result in results:
        for name, value in result["environment"].items():
            known = environment.setdefault(name, value)
            if value != known and name in ("device", "versions", "commit", "clock"):
                raise ValueError(f"results must have the same {name}, got {known} and {value}")
            if value != known and value not in known.split("; "):
                environment[name] = f"{known}; {value}"
        gemm = result["gemm_tflops"] | gemm
        cases |= by_case(result["records"])
    records = [record for case in cases.values() for record in case.values()]
    return {"environment": environment, "gemm_tflops": gemm, "records": records}


def load(path: Path) -> dict:
    result = json.loads(path.read_text(encoding="utf-8"))
    if not {"environment", "gemm_tflops", "records"} <= result.keys():
        raise ValueError(f"{path} is not a result of pytest benchmarks")
    for record in result["records"]:
        record.setdefault("base", "dense")  # as it was before there were others
    return result


def by_case(records: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Records of each case by provider, in the order in which they were measured."""
    cases: dict[tuple, dict[str, dict]] = {}
    for record in records:
        cases.setdefault(tuple(record[field] for field in CASE_FIELDS), {})[record["provider"]] = record
    return cases


def ratio(record: dict, case: dict[str, dict], peer: str, field: str = "median") -> float | None:
    """A record's time (or ``peak_bytes``) over that of a peer in its case; None where either is missing."""
    for names in PEERS[peer]:
        values = [case[name][field] for name in names if case.get(name, {}).get(field)]
        if values:
            return record[field] / min(values) if record.get(field) else None
    return None


def title(key: tuple) -> str:
    """A case in words."""
    level, mode, shape, batch, length, rank, dtype, checkpointing, base = key
    tokens = f"{batch * length} tokens" if level == "layer" else f"{batch}×{length} tokens"
    parts = [shape.replace("x", "×") if level == "layer" else shape, tokens, f"r = {rank}", dtype]
    return f"{level}, {mode}: " + ", ".join(
        parts + [f"{base} base"] * (base != "dense") + ["checkpointed"] * checkpointing
    )
