"""``bora_kernels.analysis`` of models adapted by PEFT, and of saved adapters on the command line."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.peft_models import make_base, make_ids, train_a_little  # noqa: E402
from helpers.weight_changes import assert_change  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from bora_kernels import convert, save_adapter  # noqa: E402
from bora_kernels.analysis import StepRecorder, from_start  # noqa: E402
from bora_kernels.analysis.__main__ import main  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402

METHODS = {
    "bora": (BoraConfig, {}),
    "bora-col_row": (BoraConfig, {"norm_order": "col_row"}),
    "bora-dora": (BoraConfig, {"use_dora": True}),
    "lora": (LoraConfig, {}),
    "rslora": (LoraConfig, {"use_rslora": True, "init_lora_weights": "gaussian"}),
    "dora": (LoraConfig, {"use_dora": True}),
}


def adapted(method, kind="llama", **options):
    config, own = METHODS[method]
    own = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **own, **options}
    return get_peft_model(make_base(kind), config(**own))


def merged_weights(model):
    """W' of every linear layer as PEFT merges it in float64, which rounds nothing."""
    wide = copy.deepcopy(model).double()
    return {name: p for name, p in wide.merge_and_unload().named_parameters() if name.endswith(".weight")}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", METHODS)
def test_from_start(method, kind):
    model = train_a_little(adapted(method, kind))
    base, merged = make_base(kind), merged_weights(model)
    changes = from_start(model)
    linear = {n for n, p in base.named_parameters() if p.dim() == 2 and not torch.equal(merged[n], p.double())}
    assert {f"{change.layer}.weight" for change in changes} == linear
    for change in changes:
        name = f"{change.layer}.weight"
        before, after = base.get_parameter(name), merged[name]
        if kind == "gpt2":  # its weights are [K, N]
            before, after = before.T, after.T
        assert_change(change, before, after, 2e-4)


@pytest.mark.parametrize("method", ["bora", "dora"])
def test_recorded_steps(method):
    model = train_a_little(adapted(method, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    recorder = StepRecorder(model, optimizer, every=2)
    for _ in range(2):
        before = merged_weights(model)
        model(input_ids=make_ids(), labels=make_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = merged_weights(model)
    assert len(recorder.changes) == 4 and {change.step for change in recorder.changes} == {2}
    for change in recorder.changes:
        name = f"{change.layer}.weight"
        assert_change(change, before[name], after[name], 2e-3)


def test_full_fine_tuning_of_transposed_layers():
    model = make_base("gpt2")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight += 0.01 * torch.randn(32, 96)
    changes = {change.layer: change for change in from_start(model, start)}
    name = "transformer.h.0.attn.c_attn"
    assert_change(changes[name], start[f"{name}.weight"].T, model.get_parameter(f"{name}.weight").T, 1e-4)
    assert changes["transformer.h.1.attn.c_attn"].direction_row < 1e-12


def test_a_merged_bora_layer_still_knows_its_start():
    model = train_a_little(adapted("bora", kind="bert"))
    before = from_start(model)
    model.merge_adapter()
    assert from_start(model) == before


def test_refusals():
    model = train_a_little(adapted("lora"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="q_proj must not be merged"):
        from_start(model)
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"one active adapter, got \['default', 'second'\]"):
        from_start(model)
    model = adapted("bora", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="start must hold W0"):
        from_start(model)
    changes = from_start(model, make_base().state_dict())  # W' is W0 at the start, in parts
    assert all(max(change.direction_row, change.direction_col) < 1e-9 for change in changes)


@pytest.mark.parametrize("how", ["convert", "lora"])
def test_the_command_line(how, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    make_base().save_pretrained(tmp_path / "base")
    if how == "convert":
        model = convert(make_base(), r=2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.05 * torch.randn_like(parameter) * ("lora_B" in name or "magnitude" in name)
        save_adapter(model, tmp_path / "adapter")
    else:
        model = train_a_little(adapted("lora"))
        model.save_pretrained(tmp_path / "adapter")
    figure = tmp_path / "figure.png"
    main([str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--figure", str(figure)])
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    for change in from_start(model):
        found = [float(x) for x in lines[change.layer]]
        wanted = [change.magnitude_row, change.direction_row, change.magnitude_col, change.direction_col]
        assert found == pytest.approx(wanted, rel=2e-3)
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--base MODEL" in capsys.readouterr().out
