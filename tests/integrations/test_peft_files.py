"""Files of BoRA adapters: what PEFT and transformers save and load."""

import copy
import json

import pytest
import torch
from helpers.peft_models import (
    LAYERS,
    MODELS,
    TOKENS,
    Layers,
    bora_layers,
    make_base,
    make_ids,
    make_peft,
    train_a_little,
)
from packaging.version import Version
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model  # noqa: E402

from bora_kernels.integrations.peft import BoraConfig, BoraModel  # noqa: E402

models = pytest.mark.parametrize("kind", MODELS)


def logits(model):
    with torch.no_grad():
        return model(make_ids()).logits


# ---- files ----


@models
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["direct", "meta"])
def test_an_adapter_is_loaded_without_a_config(kind, low_cpu_mem_usage, tmp_path):
    model = make_peft(make_base(kind), norm_order="col_row", use_rslora=True, rank_pattern={"up_proj": 2})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    config = loaded.active_peft_config
    assert type(config) is BoraConfig and type(loaded.base_model) is BoraModel
    assert (config.norm_order, config.detach_norm, config.use_rslora) == ("col_row", False, True)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_files_names_are_those_of_lora_and_two_magnitudes(tmp_path):
    model = make_peft(make_base(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = "base_model.model.model.layers.{}.self_attn.q_proj.{}.weight"
    names = ("lora_A", "lora_B", "lora_magnitude_vector_row", "lora_magnitude_vector_col")
    assert set(tensors) == {path.format(i, name) for i in range(2) for name in names}
    shapes = [list(tensors[path.format(0, name)].shape) for name in names]
    assert shapes == [[4, 32], [32, 4], [32], [32]]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["norm_order"], config["detach_norm"]) == (
        "BORA_BIDIMENSIONAL",
        "row_col",
        False,
    )
    assert type(PeftConfig.from_pretrained(tmp_path)) is BoraConfig


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", False], ids=str)
def test_adapters_with_an_initialization_are_loaded(init, tmp_path):
    """Those that change the base weight change it again when they are loaded."""
    model = make_peft(make_base(), init_lora_weights=init)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path):
    make_peft(make_base(), r=2).save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(make_base(), tmp_path))
    model = make_peft(make_base(), target_modules=["q_proj"])
    first = logits(model)
    model.load_adapter(tmp_path, "loaded")
    assert torch.equal(logits(model), first)
    model.set_adapter("loaded")
    assert torch.equal(logits(model), expected)


def test_an_adapter_of_pefts_dora_is_loaded(tmp_path):
    """With its own configuration as keywords; outputs are those of PEFT, for every kind of layer."""
    torch.manual_seed(0)
    base = Layers()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, use_dora=True)
    theirs = train_a_little(get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path)
    config = BoraConfig(**LoraConfig.from_pretrained(tmp_path).to_dict())
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config)
    assert type(ours.base_model) is BoraModel and config.detach_norm
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS), rtol=1e-5, atol=1e-5)


def test_every_kind_of_layer_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    base = Layers()
    model = make_peft(copy.deepcopy(base), target_modules=LAYERS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    saved = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(t, saved[name]) for name, t in peft.get_peft_model_state_dict(loaded).items())
    expected = model(TOKENS)
    torch.testing.assert_close(loaded(TOKENS), expected, rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(merged(TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_auto_model_loads_the_base_and_the_adapter(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    model = make_peft(make_base())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)


# ---- transformers' own interface ----


def test_transformers_loads_switches_and_saves_adapters(tmp_path):
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this version of transformers takes PEFT {MIN_PEFT_VERSION} or newer, got {peft.__version__}")
    model = make_peft(make_base())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = make_base()
    start = logits(base)
    base.load_adapter(tmp_path / "adapter")
    assert len(bora_layers(base)) == 14 and torch.equal(logits(base), expected)
    base.disable_adapters()
    assert torch.equal(logits(base), start)
    base.enable_adapters()
    base.add_adapter(BoraConfig(r=2, target_modules=["q_proj"]), "second")
    base.set_adapter("second")
    torch.testing.assert_close(logits(base), start, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="must name one adapter"):
        base.set_adapter(["default", "second"])
    base.set_adapter("default")
    base.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(make_base(), tmp_path / "again")), expected)


@pytest.mark.parametrize("option, value", [("norm_order", "col_row"), ("detach_norm", True)])
@pytest.mark.parametrize("where", ["layer", "configuration"])
def test_options_that_the_file_would_not_tell_are_refused(option, value, where, tmp_path):
    model = make_peft(make_base(), target_modules=["q_proj"])
    if where == "layer":
        getattr(list(bora_layers(model).values())[1], option)["default"] = value
    else:
        setattr(model.peft_config["default"], option, value)
    with pytest.raises(ValueError, match=f"{option} of .*q_proj must be as in the configuration that is saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
