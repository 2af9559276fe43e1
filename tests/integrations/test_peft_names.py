"""The names that BoRA goes by: its type in PEFT, its parameters, and those of adapters that earlier versions saved."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.peft_models import bora_layers, make_base, make_ids, make_peft, train_a_little, trained_parameters
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
from peft import PeftConfig, PeftModel  # noqa: E402

from bora_kernels import load_adapter, save_adapter  # noqa: E402
from bora_kernels.adapters.conversion import adapted_layers  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig, BoraModel  # noqa: E402

PEFT_TYPE = "BORA_BIDIMENSIONAL"


def logits(model):
    with torch.no_grad():
        return model(make_ids()).logits


def test_the_type_is_its_own():
    assert BoraConfig().peft_type == PEFT_TYPE and BoraConfig().peft_type.value == PEFT_TYPE
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is BoraModel
    assert "BORA" not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING  # left to another method of that name
    model = peft.get_peft_model(make_base(), BoraConfig(target_modules=["q_proj"]))
    assert peft.get_model_status(model).peft_types == {"default": PEFT_TYPE}


FOREIGN_ENTRIES = f"""
import peft.mapping

tables = [getattr(peft.mapping, f"PEFT_TYPE_TO_{{kind}}_MAPPING") for kind in ("CONFIG", "TUNER", "PREFIX")]
for table, entry in zip(tables, (peft.LoHaConfig, peft.LoHaModel, "hada_")):
    table["{PEFT_TYPE}"] = entry
    before = list(map(dict, tables))
    try:
        import bora_kernels.integrations.peft
    except ValueError as error:
        print(error)
    assert before == list(map(dict, tables))
    del table["{PEFT_TYPE}"]
import bora_kernels.integrations.peft
"""


def test_a_foreign_entry_of_that_type_is_not_overwritten():
    """In any of PEFT's tables, in a process that has not imported the integration yet."""
    command = [sys.executable, "-c", FOREIGN_ENTRIES]
    found = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    messages = [line for line in found.stdout.splitlines() if line.startswith("PEFT's type")]
    assert len(messages) == 3, found.stdout
    for message, entry in zip(messages, ("LoHaConfig", "LoHaModel", "hada_"), strict=True):
        assert f"PEFT's type {PEFT_TYPE} must be free for bora_kernels, got" in message and entry in message


@pytest.mark.parametrize("use_dora", [False, True], ids=["bora", "dora"])
def test_magnitudes_have_the_name_that_rules_for_dora_look_for(use_dora, tmp_path):
    """A substring of the parameters' names, which PEFT rewrites where a name ends with it."""
    model = make_peft(make_base(), use_dora=use_dora)
    model.add_adapter("second", BoraConfig(r=2, target_modules=["q_proj"], use_dora=use_dora))
    train_a_little(model, "second", seed=4)
    vectors = {name for name, p in model.named_parameters() if p.requires_grad and p.ndim == 1}
    assert vectors and vectors == {
        n for n, p in model.named_parameters() if p.requires_grad and "lora_magnitude_vector" in n
    }
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(make_base(), folder, adapter_name="renamed")
        assert torch.equal(logits(loaded), logits(model))
        kinds = {key.rpartition("lora_magnitude")[2] for key in load_file(folder / "adapter_model.safetensors")}
        assert kinds - {key for key in kinds if "lora_" in key} == (
            {"_vector_row.weight"} if use_dora else {"_vector_row.weight", "_vector_col.weight"}
        )


def as_earlier_versions_wrote(folder):
    """The folder with the names and the type of format 1.0."""
    path = folder / "adapter_model.safetensors"
    tensors = {name.replace("magnitude_vector_", "magnitude_"): t for name, t in load_file(path).items()}
    assert any(name.endswith(".lora_magnitude_row.weight") for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "BORA"}))


@pytest.mark.parametrize("use_dora", [False, True], ids=["bora", "dora"])
def test_adapters_of_earlier_versions_load(use_dora, tmp_path):
    model = make_peft(make_base(), use_dora=use_dora, norm_order="col_row")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    as_earlier_versions_wrote(tmp_path)
    config = BoraConfig.from_pretrained(tmp_path)
    assert type(config) is BoraConfig and config.peft_type == PEFT_TYPE and config.norm_order == "col_row"
    assert torch.equal(logits(PeftModel.from_pretrained(make_base(), tmp_path, config=config)), expected)

    ours = load_adapter(make_base(), tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-6, atol=1e-6)
    save_adapter(ours, tmp_path / "migrated")
    migrated = PeftModel.from_pretrained(make_base(), tmp_path / "migrated")
    assert torch.equal(logits(migrated), expected)
    values = [p for layer in adapted_layers(ours).values() for p in (layer.magnitude_row, layer.magnitude_col)]
    kept = [p for name, p in migrated.named_parameters() if "magnitude" in name]
    assert len(kept) == sum(p is not None for p in values) == len(bora_layers(migrated)) * (1 if use_dora else 2)


def test_another_methods_adapter_of_the_former_type_is_refused(tmp_path):
    config = {"peft_type": "BORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adapter_config.json must have norm_order .*another method of that name"):
        BoraConfig.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match="BORA"):
        PeftConfig.from_pretrained(tmp_path)


def test_trained_parameters_of_both_kinds_of_model_are_told_apart_by_name():
    """What a trainer's rule ``"lora_magnitude_vector" not in name`` casts leaves the magnitudes in float32."""
    model = make_peft(make_base().bfloat16(), trained=False)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.bfloat16()
    dtypes = {("magnitude" in name, p.dtype) for name, p in trained_parameters(model).items()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
