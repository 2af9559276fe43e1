"""``bora_kernels.analysis`` against explicit loops in float64, for adapters of every kind and full fine-tuning."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from helpers.weight_changes import FIELDS, assert_change
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bora_kernels import convert
from bora_kernels.analysis import Change, StepRecorder, correlation, from_start, plot, table, weight_change
from bora_kernels.reference import bora_weight_ref


def effective(layer):
    """W' of a layer of this package in float64, by the reference."""
    tensors = (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude_row, layer.magnitude_col)
    wide = [None if t is None else t.detach().double() for t in tensors]
    return bora_weight_ref(*wide, scaling=layer.scaling, norm_order=layer.norm_order)


def make_model(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 5), nn.Tanh(), nn.Linear(5, 7)).to(dtype)


def train(model, optimizer, steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(16, 9, generator=generator).to(dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :7]).square().mean().backward()
        optimizer.step()
    return model


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


# ---- one weight ----


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (13, 1), (6, 11), (33, 20)], ids=str)
def test_weight_change_is_its_definition(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    before, after = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    assert_change(weight_change(before, after), before, after, 1e-12)


def test_what_one_float32_step_changes_is_not_lost():
    """ΔD is near 5e-9 here, where float32's 1 - cos has no digit left, and ΔM a ten-thousandth of a norm."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(40, 96, generator=generator)
    after = before * (1 + 1e-4 * torch.randn(40, 96, generator=generator))
    change = weight_change(before, after)
    assert 1e-9 < change.direction_row < 1e-8
    assert_change(change, before, after, 1e-4)


def test_zero_rows_and_columns_are_not_turned():
    before, after = torch.eye(4).double(), 2 * torch.eye(4).double()
    before[1], after[2], before[:, 3] = 0, 0, 0
    change = weight_change(before, after)
    assert_change(change, before, after, 1e-12)
    assert change.direction_row == change.direction_col == 0


def test_turns_and_growth_are_told_apart():
    weight = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = weight_change(weight, torch.linalg.qr(weight)[0] @ weight)  # columns turn, and keep their norms
    assert turned.magnitude_col < 1e-14 and turned.direction_col > 0.1
    grown = weight_change(weight, weight * torch.arange(1, 6)[:, None])  # rows grow, and keep their directions
    assert grown.direction_row < 1e-30 and grown.magnitude_row > 1 and grown.direction_col > 0.01
    assert weight_change(weight, -weight).direction_row == pytest.approx(2)


@pytest.mark.parametrize(
    ("before", "after", "error", "name"),
    [
        (torch.ones(3, 4), torch.ones(4, 3), ValueError, "after"),
        (torch.ones(3, 4, 1), torch.ones(3, 4, 1), ValueError, "before"),
        (torch.ones(0, 4), torch.ones(0, 4), ValueError, "before"),
        (torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int8), TypeError, "after"),
    ],
)
def test_weight_change_refuses(before, after, error, name):
    with pytest.raises(error, match=name):
        weight_change(before, after)


# ---- from the start ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"norm_order": "col_row"}, {"method": "dora"}, {"detach_norm": True, "rslora": True, "dropout": 0.1}],
    ids=str,
)
def test_from_start_of_a_converted_model(options, dtype):
    model = convert(make_model(dtype), r=3, alpha=5, target_modules=["0", "4"], **options)
    train(model, torch.optim.AdamW(trained_parameters(model), lr=3e-2), 4, dtype)
    for merged in (False, True):  # merging rounds a half-precision W', which must not be seen
        if merged:
            model[0].merge(), model[4].merge()
        changes = from_start(model)
        assert [change.layer for change in changes] == ["0", "4"] and {change.step for change in changes} == {None}
        for change in changes:
            layer = model[int(change.layer)]
            assert_change(change, layer.weight, effective(layer), 1e-12 if dtype == torch.float64 else 1e-4)


def test_an_untrained_adapter_changed_nothing():
    for change in from_start(convert(make_model(torch.bfloat16), r=2)):
        assert max(getattr(change, field) for field in FIELDS) < 1e-6


def test_full_fine_tuning_with_a_kept_start():
    model = make_model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "2.weight"}
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    changes = from_start(model, start)
    assert [change.layer for change in changes] == ["0", "4"]
    for change in changes:
        name = f"{change.layer}.weight"
        assert_change(change, start[name], model.get_parameter(name), 1e-4)
    with pytest.raises(ValueError, match="start"):
        from_start(model)


def test_a_single_layer_is_a_model():
    layer = nn.Linear(3, 4)
    start = {"weight": torch.randn(4, 3)}
    (change,) = from_start(layer, start)
    assert_change(change, start["weight"], layer.weight, 1e-4)


# ---- steps ----


@pytest.mark.parametrize("how", ["bora", "dora", "full"])
def test_recorded_steps_are_what_the_steps_did(how):
    model = make_model()
    if how != "full":
        convert(model, r=2, method=how)
    weight = (lambda layer: layer.weight.detach().double()) if how == "full" else effective
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    recorder, snapshots = StepRecorder(model, optimizer, every=3), []

    def snapshot(*_):
        snapshots.append({name: copy.deepcopy(weight(model[int(name)])) for name in "024"})

    optimizer.register_step_post_hook(snapshot)
    snapshot()
    train(model, optimizer, 7)
    assert [(c.step, c.layer) for c in recorder.changes] == [(step, name) for step in (3, 6) for name in "024"]
    for change in recorder.changes:
        before, after = (snapshots[step][change.layer] for step in (change.step - 1, change.step))
        assert_change(change, before, after, 2e-3)
    recorder.close()
    train(model, optimizer, 3)
    assert len(recorder.changes) == 6


class Operations(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_other_steps_cost_nothing():
    """The operators of a step are those of a step without a recorder, and it keeps no tensor."""
    counts = []
    for recorded in (False, True):
        model = convert(make_model(), r=2)
        optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
        if recorded:
            recorder = StepRecorder(model, optimizer, every=4)
        train(model, optimizer, 1)
        with Operations() as operations:
            train(model, optimizer, 2)
        counts.append(operations.names)
    assert counts[0] == counts[1] and counts[0]
    assert recorder._before is None and not recorder.changes
    with Operations() as operations:
        train(model, optimizer, 1)  # the fourth
    assert len(operations.names) > len(counts[0]) and len(recorder.changes) == 3
    assert recorder._before is None


@pytest.mark.parametrize("every", [0, -1, 2.5, None])
def test_the_recorder_refuses_an_interval(every):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every"):
        StepRecorder(model, optimizer, every=every)
    assert not optimizer._optimizer_step_pre_hooks


def test_the_recorder_needs_a_trained_layer():
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="model"):
        StepRecorder(model, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    with pytest.raises(TypeError, match="model"):
        from_start(model.state_dict())


# ---- correlation, table and figure ----


def changes_of(points, step=None):
    return [Change(f"layer.{i}", step, m, d, m, -d) for i, (m, d) in enumerate(points)]


def test_correlation_is_taken_within_steps():
    """Layers correlate at +1 in each step, while over the steps ΔM falls as ΔD grows."""
    first, second = [(10, 1), (11, 2), (12, 3)], [(1, 10), (2, 11), (3, 12)]
    both = changes_of(first, step=1) + changes_of(second, step=2)
    assert correlation(both, "row") == pytest.approx(1) and correlation(both, "col") == pytest.approx(-1)
    assert correlation(changes_of([(0, 0), (1, 1), (2, 0)]), "row") == pytest.approx(0)
    known = changes_of([(1, 2), (2, 1), (3, 4), (4, 3)])  # 3 / 5, by hand
    assert correlation(known, "row") == pytest.approx(0.6)


def test_correlation_passes_over_steps_without_one():
    flat = changes_of([(1, 1), (1, 2), (1, 3)], step=1)
    assert correlation(flat + changes_of([(1, 3), (2, 2), (3, 1)], step=2), "row") == pytest.approx(-1)
    for changes in (flat, changes_of([(1, 2)]), []):
        with pytest.raises(ValueError, match="changes"):
            correlation(changes, "row")
    with pytest.raises(ValueError, match="axis"):
        correlation(flat, "input")


def test_the_table_has_a_line_for_each_layer():
    lines = table(changes_of([(1, 2e-8), (2, 1e-8), (3, 4e-8)])).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "layer.0", "layer.1", "layer.2", "mean", "correlation"]
    assert lines[1].split()[1:] == ["1.000e+00", "2.000e-08", "1.000e+00", "-2.000e-08"]
    assert float(lines[4].split()[1]) == 2


@pytest.mark.parametrize("steps", [(None,), (1, 2)])
def test_plot_writes_a_picture(tmp_path, steps):
    pytest.importorskip("matplotlib")
    changes = [c for step in steps for c in changes_of([(1, 0.1), (2, 0.3), (3, 0.2)], step)]
    for number in (1, len(changes)):
        plot(changes[:number], tmp_path / "changes.png")
        assert (tmp_path / "changes.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="changes"):
        plot([], tmp_path / "none.png")


def test_optional_libraries_are_imported_when_used():
    code = "import sys, bora_kernels.analysis; print({'matplotlib', 'peft', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
