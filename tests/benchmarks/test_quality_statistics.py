"""The study's statistics on cases with known answers, and its decision rule."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import findings, report
from benchmarks.quality.methods import CONTRASTS, METHODS, PRIMARY
from benchmarks.quality.stages import STAGE1_SEEDS, STAGE2_SEEDS
from benchmarks.quality.statistics import (
    Contrast,
    Scores,
    choices,
    contrasts,
    holm,
    resampled,
    seed_deviation,
    sign_flip_p,
    t_interval,
    t_quantile,
)
from benchmarks.quality.tables import interval, signed
from benchmarks.quality.tasks import PRIMARY_TASKS

TASKS = PRIMARY_TASKS


# ---- p, Holm, intervals ----


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3], 2 / 8),
        ([1.0] * 5, 2 / 32),
        ([1, -1], 1.0),
        ([3, -1, 1], 6 / 8),
        ([0, 0, 2], 1.0),
        ([0.1] * 3, 2 / 8),
    ],
)
def test_sign_flips_of_few_pairs_are_counted(differences, p):
    """[3, -1, 1]: sums over signs are ±3 ± 1 ± 1, of which 6 of 8 are at least 3 in size."""
    assert sign_flip_p(differences) == pytest.approx(p)


def test_sign_flips_of_many_pairs_are_drawn():
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 1, (200, 24))
    small = np.array([sign_flip_p(d, flips=2000) for d in noise])
    assert 0.005 < (small < 0.05).mean() < 0.11  # of no difference, one in twenty is called one
    assert sign_flip_p(np.full(24, 0.3) + 0.01 * noise[0]) == pytest.approx(1 / 100_001, rel=0.5)
    assert sign_flip_p(noise[0]) == sign_flip_p(-noise[0]) == sign_flip_p(7 * noise[0])


def test_holm():
    assert holm({"a": 0.01, "b": 0.04}) == {"a": 0.02, "b": 0.04}
    assert holm({"a": 0.04, "b": 0.03}) == {"b": 0.06, "a": 0.06}  # never below a smaller one's
    assert holm({"a": 0.9, "b": 0.8, "c": 0.001}) == pytest.approx({"c": 0.003, "b": 1.0, "a": 1.0})


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (7, 2.3646), (23, 2.0687), (200, 1.9719)])
def test_students_quantile(freedom, value):
    assert t_quantile(freedom, 0.975) == pytest.approx(value, rel=2e-4)


def test_t_interval():
    mean, half = t_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(3.1824 * math.sqrt(5 / 3) / 2, rel=1e-4)
    assert math.isnan(t_interval([1.0])[1])


# ---- the bootstrap ----


def make_scores(mean, *, noise=1.0, seeds1=4, seeds2=24, gap=5.0, seed=0, shift=0.0):
    """Three learning rates, the middle one better by ``gap``."""
    rng = np.random.default_rng(seed)
    bends = np.array([[-gap], [0.0], [-gap]])
    validation = mean + bends + noise * rng.normal(size=(3, seeds1))
    test = mean + bends + noise * rng.normal(size=(3, seeds1))
    chosen = int(validation.mean(1).argmax())
    return Scores(
        (1.0, 2.0, 4.0), validation, test, chosen, mean + shift + bends[chosen] + noise * rng.normal(size=seeds2)
    )


def test_a_resample_of_all_seeds_once_is_the_mean():
    scores = make_scores(70)
    whole = np.arange(4)[None], np.arange(24)[None]
    assert resampled(scores, *whole) == pytest.approx([scores.final.mean()])


def test_where_another_rate_wins_the_score_moves_by_stage_1():
    validation = np.array([[5.0, 0.0], [1.0, 8.0]])  # the second rate is chosen: 4.5 over 2.5
    test = np.array([[10.0, 20.0], [14.0, 30.0]])
    scores = Scores((1.0, 2.0), validation, test, 1, np.array([50.0, 52.0]))
    first = np.array([[0, 0], [0, 1], [1, 1]])
    second = np.array([[0, 1], [1, 1], [0, 0]])
    # drawn twice, the first seed prefers the first rate, whose test score of that seed is 4 lower
    assert resampled(scores, first, second) == pytest.approx([51 - 4, 52, 50])


def test_the_choice_of_the_rate_widens_the_interval():
    def width(gap):
        table = {"t": {"a": make_scores(70, gap=gap, seed=1), "b": make_scores(70, gap=gap, seed=2)}}
        found = contrasts(table, [("a", "b")], {"t": 1.0}, resamples=2000)["a", "b"]
        return found.high - found.low

    assert width(gap=0.0) > 1.2 * width(gap=50.0)


def test_intervals_cover_the_truth():
    """95 % intervals of a true difference of half a deviation, over four tasks, in 200 studies."""
    covered = []
    for study in range(200):
        table = {
            t: {m: make_scores(50 + 0.5 * (m == "a"), seed=1000 * study + 10 * i + (m == "a")) for m in "ab"}
            for i, t in enumerate(TASKS)
        }
        found = contrasts(table, [("a", "b")], dict.fromkeys(TASKS, 1.0), resamples=400)["a", "b"]
        covered.append(found.low < 0.5 < found.high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_choices_are_counted_over_all_resamples():
    """Of two seeds there are four draws: both twice, where the second rate wins by 4.5 over 2.5, and each alone."""
    validation = np.array([[5.0, 0.0], [1.0, 8.0], [0.0, 0.0]])
    scores = Scores((1.0, 2.0, 4.0), validation, validation, 1, np.zeros(3))
    assert choices(scores) == {1.0: 0.25, 2.0: 0.75}


def test_contrasts_are_pooled_in_units_of_each_task():
    first, second = make_scores(10, noise=0.1, seed=3), make_scores(1000, noise=10, seed=4)

    def better(scores, by):
        return Scores(scores.rates, scores.validation + by, scores.test + by, scores.chosen, scores.final + by)

    table = {"x": {"a": better(first, 0.1), "b": first}, "y": {"a": better(second, -30), "b": second}}
    unit = {"x": 0.1, "y": 10.0}
    found = contrasts(table, [("a", "b")], unit, resamples=500)["a", "b"]
    assert found.estimate == pytest.approx((1 - 3) / 2)
    assert found.low == pytest.approx(-1) and found.high == pytest.approx(-1)  # the pairs share their noise
    assert found.tasks["x"] == pytest.approx((1, 1, 1)) and found.without == pytest.approx({"x": -3, "y": 1})


def test_the_smaller_p_gets_the_wider_interval():
    table = {"t": {"a": make_scores(71, seed=1), "b": make_scores(70, seed=2), "c": make_scores(71, seed=3)}}
    found = contrasts(table, [("a", "b"), ("a", "c")], {"t": 1.0}, resamples=500)
    assert found["a", "b"].p < found["a", "c"].p
    assert found["a", "b"].level == pytest.approx(0.975) and found["a", "c"].level == pytest.approx(0.95)
    assert found["a", "b"].p_holm == pytest.approx(2 * found["a", "b"].p)


def test_the_unit_is_the_root_of_the_mean_variance():
    scores = [make_scores(0, seed=s) for s in (1, 2)]
    variances = [np.var(s.final, ddof=1) for s in scores]
    assert seed_deviation(scores) == pytest.approx(math.sqrt(sum(variances) / 2))


# ---- the rule ----


def contrast(estimate, low, high, tasks=(1, 1, 1, 1)):
    by_task = {task: (float(value), 0.0, 0.0) for task, value in zip(TASKS, tasks, strict=True)}
    return Contrast(estimate, low, high, 0.95, 0.01, 0.02, by_task, {})


GOOD = contrast(0.5, 0.1, 0.9)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (contrast(0.5, 0.01, 0.9), "reproduced"),
        (contrast(0.5, 0.01, 0.9, tasks=(1, 1, 1, -1)), "reproduced"),
        (contrast(0.5, 0.01, 0.9, tasks=(1, 1, 0, -1)), "undecided"),
        (contrast(0.5, -0.01, 0.9), "undecided"),
        (contrast(0.19, 0.05, 0.3), "undecided"),
        (contrast(0.1, 0.05, 0.19), "not reproduced"),  # there, but smaller than what would matter
        (contrast(-0.5, -0.9, -0.1), "not reproduced"),
        (contrast(0.0, -0.5, 0.21), "undecided"),
    ],
)
def test_the_finding_follows_the_rule(second, expected):
    for pair in ((GOOD, second), (second, GOOD)):
        assert findings.finding(dict(zip(CONTRASTS, pair, strict=True))) == expected


def test_without_all_tasks_there_is_no_finding():
    assert findings.finding({}) == "incomplete"
    assert findings.finding({CONTRASTS[0]: GOOD}) == "incomplete"
    three = Contrast(0.5, 0.1, 0.9, 0.95, 0.01, 0.02, dict(list(GOOD.tasks.items())[:3]), {})
    assert findings.finding(dict.fromkeys(CONTRASTS, three)) == "incomplete"


# ---- from records to the report ----


def records(advantage, tasks=TASKS, methods=PRIMARY, seeds2=STAGE2_SEEDS):
    """Runs in which BoRA leads by ``advantage`` seed deviations and 2e-3 is the best learning rate of all."""
    found, rng = [], np.random.default_rng(9)
    for task in tasks:
        for method in methods:
            mean = 70 + (advantage if method == "bora" else 0)

            def add(stage, seed, lr, loss, task=task, method=method, mean=mean):
                score = mean - loss + rng.normal()
                common = {"stage": stage, "variant": "", "task": task, "method": method, "seed": seed, "lr": lr}
                common |= {"validation": score, "test": score, "test_loss": -score / 100, "validation_loss": 0.0}
                found.append(common | {"diverged": False, "seconds": 0.1, "session": 0})

            for lr, loss in ((5e-4, 20), (1e-3, 10), (2e-3, 0), (4e-3, 10), (8e-3, 20)):
                for seed in STAGE1_SEEDS:
                    add("stage1", seed, lr, loss)
            for seed in seeds2:
                add("stage2", seed, 2e-3, 0)
    return found


@pytest.mark.parametrize(("advantage", "expected"), [(1.5, "reproduced"), (-1.5, "not reproduced"), (0.3, "undecided")])
def test_records_lead_to_the_finding(advantage, expected):
    table = findings.scores(records(advantage))
    found = findings.primary_contrasts(table)
    assert findings.finding(found) == expected
    for value in found.values():
        assert value.estimate == pytest.approx(advantage, abs=0.35)
    by_loss = findings.primary_contrasts(findings.scores(records(advantage), "loss"))
    assert by_loss[CONTRASTS[0]].estimate == pytest.approx(
        found[CONTRASTS[0]].estimate
    )  # −100 · loss is the score here


def test_a_missing_task_or_seed_leaves_it_incomplete():
    fewer = findings.primary_contrasts(findings.scores(records(2.0, tasks=TASKS[:3])))
    assert findings.finding(fewer) == "incomplete" and set(fewer[CONTRASTS[0]].tasks) == set(TASKS[:3])
    short = findings.primary_contrasts(findings.scores(records(2.0, seeds2=STAGE2_SEEDS[:-1])))
    assert short == {} and findings.finding(short) == "incomplete"


def test_the_report_of_complete_runs(tmp_path):
    session = {"date": "today", "device": "a device", "versions": {"torch": "2"}, "commit": "abc", "checks": {}}
    runs = tmp_path / "runs.json"
    content = records(1.5)
    content[5]["diverged"] = True
    runs.write_text(json.dumps({"sessions": [session], "records": content}))
    text = report.write(runs, tmp_path / "report")
    assert "## Finding: reproduced" in text and "made-up" not in text
    assert f"| stage1 | {4 * 3 * 20} | 1 |" in text and f"| stage2 | {4 * 3 * 24} | 0 |" in text
    for method in PRIMARY:
        assert METHODS[method].label in text
    assert "a device" in text and "abc" in text


# ---- what is recorded ----

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "quality" / "results"


@pytest.fixture(scope="module")
def recorded():
    return (RESULTS / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_recorded_report_is_that_of_the_recorded_runs(recorded, tmp_path):
    assert report.write(RESULTS / "runs.json", tmp_path) == recorded


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_documents_say_what_was_found(name):
    """The finding and its two contrasts, to the digit, beside the recorded figure."""
    found = findings.primary_contrasts(findings.scores(json.loads((RESULTS / "runs.json").read_text())["records"]))
    text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
    assert f"the finding is **{findings.finding(found)}**" in text
    for contrast in found.values():
        assert f"{signed(contrast.estimate)} {interval(contrast.low, contrast.high)}" in text
    assert "quality/results/contrasts.png" in text and (RESULTS / "contrasts.png").is_file()


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_intervals_in_documents_are_the_reports(name, recorded):
    """Each "0.09 ± 0.04" and "[−0.36, +0.72]" of the section, but for the sign before it."""
    section = (ROOT / name).read_text(encoding="utf-8").split("## Is BoRA better?\n")[1].split("\n## ")[0]
    text = " ".join(section.split())
    for pattern, least in ((r"\d+\.\d\d ± \d+\.\d\d", 2), (r"\[[+−]\d+\.\d\d, [+−]\d+\.\d\d\]", 2)):
        found = re.findall(pattern, text)
        assert len(found) >= least
        assert [interval for interval in found if interval not in recorded] == []
