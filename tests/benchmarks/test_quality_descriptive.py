"""The descriptive parts of the study's report on runs with known differences."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quality import descriptive, findings, score_tables, tables
from benchmarks.quality.methods import PRIMARY
from benchmarks.quality.stages import STAGE1_SEEDS, STAGE2_SEEDS

SEEDS = STAGE2_SEEDS[:8]
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # the middle one is the best


def run(stage, task, method, seed, lr, test, validation=0.0, variant="", factor=1.0, rank=4):
    found = {"stage": stage, "variant": variant, "task": task, "method": method, "seed": seed, "lr": lr, "rank": rank}
    return found | {"magnitude_factor": factor, "test": test, "validation": validation}


def noise(seed):
    return float(np.sin(7.0 * seed))  # what a seed brings, the same for all methods


@pytest.fixture
def records():
    """Stages 1 and 2 of movies and swap, in which all methods are alike but for the seeds."""
    found = []
    for task in ("movies", "swap"):
        for method in PRIMARY:
            for lr in RATES:
                found += [run("stage1", task, method, s, lr, 70, 70 - abs(np.log2(lr / 2e-3))) for s in STAGE1_SEEDS]
            found += [run("stage2", task, method, s, 2e-3, 70 + noise(s)) for s in STAGE2_SEEDS]
    return found


def sensitive(variant, method, gain, lr=2e-3, task="movies", **options):
    return [run("sensitivity", task, method, s, lr, 70 + noise(s) + gain, variant=variant, **options) for s in SEEDS]


def lines(text):
    """The tables' lines as lists of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_of_several_rates_the_one_with_the_best_validation_is_shown(records):
    records += sensitive("rank 2", "bora", -3.0, 1e-3, validation=2.0) + sensitive(
        "rank 2", "bora", 5.0, validation=1.0
    )
    text = descriptive.sensitivity(records, findings.scores(records))
    (line,) = [line for line in lines(text) if line[:2] == ["rank 2", "BoRA"]]
    mean = 70 - 3 + np.mean([noise(s) for s in SEEDS])
    assert line[2:] == [f"{mean:.2f} (−3.00 ± 0.00)"]  # paired: the seeds' noise is gone; no runs of swap, no column


def test_each_factor_of_the_magnitudes_has_a_line(records):
    for factor, gain in ((0.25, -1.0), (1.0, 0.0), (4.0, 2.0)):
        records += sensitive(descriptive.MAGNITUDES, "dora", gain, factor=factor)
    text = descriptive.sensitivity(records, findings.scores(records))
    found = {line[0]: line[2].partition(" ")[2] for line in lines(text) if line[0].startswith(descriptive.MAGNITUDES)}
    title = f"{descriptive.MAGNITUDES}, ×"
    assert found == {
        f"{title} 0.25": "(−1.00 ± 0.00)",
        f"{title} 1": "(0.00 ± 0.00)",
        f"{title} 4": "(+2.00 ± 0.00)",
    }
    assert "The primary contrasts within a variant" not in text


def test_contrasts_within_a_variant_are_pooled_in_units(records):
    """Of two tasks whose unit is that of the noise; at LoRA's rate a method without runs has stage 2's."""
    for task in ("movies", "swap"):
        records += sensitive("rank 16", "bora", 3.0, task=task) + sensitive("rank 16", "dora", 1.0, task=task)
        records += sensitive(descriptive.LORAS_RATE, "bora", -1.0, task=task)
    table = findings.scores(records)
    unit = np.std([noise(s) for s in STAGE2_SEEDS], ddof=1)
    found = {line[0]: line[1:] for line in lines(descriptive.sensitivity(records, table)) if len(line) == 3}
    assert found["rank 16"] == ["", tables.around(2.0 / unit, 0.0)]
    assert found[descriptive.LORAS_RATE] == [tables.around(-1.0 / unit, 0.0)] * 2


def test_teachers_are_shown_at_their_best_rate():
    records = [run("teachers", "rows", "dora", seed, lr, 10 * lr + seed, 10 * lr) for lr in (1, 2) for seed in (1, 3)]
    mean, half = descriptive.teacher_scores(records)["rows"]["dora"]
    assert mean == 22 and half == pytest.approx(12.706, rel=1e-3)  # Student's quantile of one degree of freedom


def test_correlations_have_a_mean_of_tasks():
    """Layers whose direction follows their magnitude on movies (r = 1) and opposes it on swap (r = -1)."""
    records = []
    for task, sign in (("movies", 1.0), ("swap", -1.0)):
        rows = [[f"{i}.query", 1, 1.0 + i, 5.0 + sign * i, 1.0 + i, 5.0 + i] for i in range(4)]
        records += [run("mechanism", task, "lora", seed, 1e-3, 70) | {"steps": rows, "starts": rows} for seed in (1, 2)]
    found = {line[0]: line[2:] for line in lines(descriptive.mechanism(records)) if line[1] == "LoRA"}
    same, opposite, none = "+1.00 ± 0.00", "−1.00 ± 0.00", "0.00 ± 0.00"
    assert found == {
        "mean of tasks": [none, same, none, same, none, "+0.83"],
        "movies": [same] * 5 + ["+0.83"],
        "swap": [opposite, same, opposite, same, opposite, "+0.83"],
    }


def test_scores_are_compared_seed_by_seed(records):
    records = [r | {"test": r["test"] + 2} if r["method"] == "bora" else r for r in records]
    found = lines(score_tables.scores(findings.scores(records), ("swap", "movies"), "primary"))
    titles = [line[0] for line in found]
    for rival, others in (("LoRA, rank r + 1", "DoRA (detached)"), ("DoRA (detached)", "LoRA, rank r + 1")):
        place = titles.index(f"− {rival}")
        assert found[place][1:] == ["swap", "movies"]
        assert {line[0]: line[1:] for line in found[place + 2 : place + 4]} == {
            "BoRA": ["+2.00 ± 0.00"] * 2,
            others: ["0.00 ± 0.00"] * 2,
        }


def test_a_run_far_from_the_others_is_named(records):
    text = score_tables.scores(findings.scores(records), ("movies", "swap"), "primary")
    assert "All runs count" not in text
    for r in records:
        if (r["stage"], r["task"], r["method"], r["seed"]) == ("stage2", "swap", "lora_r1", 2009):
            r["test"] = 50.0
    text = score_tables.scores(findings.scores(records), ("movies", "swap"), "primary")
    (line,) = [line for line in text.splitlines() if line.startswith("All runs count")]
    assert line.count("(median") == 1 and "LoRA, rank r + 1 on swap, 50.00 (median" in line


@pytest.mark.parametrize(("rate", "text"), [(6e-4, "6e-4"), (2.4e-3, "2.4e-3"), (1.92e-2, "1.92e-2"), (0.16, "1.6e-1")])
def test_scientific(rate, text):
    assert tables.scientific(rate) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0.004, "0.00"), (-0.004, "0.00"), (-1.005, "−1.00"), (2.0, "+2.00"), (-0.25, "−0.25")]
)
def test_signed(number, text):
    assert tables.signed(number) == text
