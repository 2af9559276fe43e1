"""Models that transformers quantized, adapted and merged: they run, save and load as ordinary ones."""

import copy

import pytest
import torch
from helpers.people import VOCABULARY, adapt, adapters, ways
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import bora_kernels  # noqa: E402

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-bf16-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where transformers puts what it quantizes
IDS = torch.arange(1, 11, device=DEVICE).view(2, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, attention_bias=True, **sizes)
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=DEVICE, **options)


def quantized(folder, kind):
    """In training mode, because eval mode lets bitsandbytes repack 4-bit weights on a CPU."""
    return load(folder, quantization_config=transformers.BitsAndBytesConfig(**KINDS[kind])).train()


def trained(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(DEVICE) * parameter
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(DEVICE)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def merged(model, way):
    return bora_kernels.merge_adapter(model) if way == "convert" else model.merge_and_unload()


@ways
@kinds
def test_a_merged_model_is_an_ordinary_one(folder, kind, way, tmp_path):
    base = quantized(folder, kind)
    start = logits(base)
    model = trained(adapt(base, way))
    expected = logits(model)
    assert (expected - start).norm() > 0.2 * start.norm()
    plain = merged(model, way)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    found = logits(plain)
    assert (found - expected).norm() < 0.04 * expected.norm()
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), found)
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        assert not getattr(plain, name, None), name
    loss = plain.float()(input_ids=IDS, labels=IDS).loss  # what a model that is marked as quantized refuses
    assert loss.isfinite()


@ways
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_stays_quantized_is_loaded_as_such_beside_what_was_merged(folder, kind, way, tmp_path):
    """Were the merged layers not named in the configuration, loading would quantize W' again."""
    model = trained(adapt(quantized(folder, kind), way, ["q_proj", "down_proj"]))
    expected = logits(model)
    plain = merged(model, way)
    found = logits(plain)
    assert (found - expected).norm() < 0.04 * expected.norm()
    plain.save_pretrained(tmp_path)
    loaded = load(tmp_path).train()
    layers = dict(loaded.named_modules())
    assert type(layers["model.layers.1.mlp.down_proj"]) is nn.Linear is type(layers["lm_head"])
    assert type(layers["model.layers.1.mlp.up_proj"]).__module__.startswith("bitsandbytes")
    torch.testing.assert_close(logits(loaded), found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_small_updates_are_not_rounded_away(folder, kind):
    """W' in bfloat16 has the mean of what it is rounded from, whatever the layer computes in."""
    model = adapt(quantized(folder, kind), "peft", ["up_proj"])
    layer = next(iter(adapters(model).values()))
    with torch.no_grad():  # the magnitude that comes last decides
        layer.lora_magnitude_vector_col["default"].weight.mul_(1 + 2**-11)
    W0 = layer._weight().double()
    plain = model.merge_and_unload().model.layers[0].mlp.up_proj.weight
    assert plain.dtype == torch.bfloat16
    ratio = (plain.double() / W0)[W0 != 0].mean().item()
    assert ratio == pytest.approx(1 + 2**-11, abs=1e-4)


@kinds
def test_merging_back_and_forth_keeps_the_marks(folder, kind):
    base = quantized(folder, kind)
    model = trained(adapt(base, "peft"))
    expected = logits(model)
    model.merge_adapter()
    assert (logits(model) - expected).norm() < 0.04 * expected.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    plain = model.unload()
    assert plain.config.quantization_config is not None and plain.is_quantized


@ways
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_trainer_takes_a_quantized_model_through_peft_alone(folder, kind, way, tmp_path):
    """transformers refuses a model that it quantized unless PEFT is around it; the guide says so."""
    model = adapt(quantized(folder, kind), way)
    data = [{"input_ids": ids, "labels": ids} for ids in IDS.cpu()]
    options = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=DEVICE == "cpu", **options)
    if way == "convert":
        with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
            transformers.Trainer(model=model, args=arguments, train_dataset=data)
        return
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    still = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert not still, still


# ---- state dicts of merged models ----


def plain_base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes)).to(DEVICE)


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_a_merged_models_state_dict_is_the_unmerged_ones(folder, kind):
    model = trained(adapt(plain_base() if kind == "dense" else quantized(folder, kind), "peft"))
    before = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in model.state_dict().items()}
    model.merge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(not isinstance(t, torch.Tensor) or torch.equal(t, before[name]) for name, t in after.items())
    assert all(layer.merged for layer in adapters(model).values())


def test_loading_a_state_dict_into_a_merged_model_unmerges_it():
    model = trained(adapt(plain_base(), "peft"))
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    model.load_state_dict(state)
    assert not any(layer.merged for layer in adapters(model).values()) and torch.equal(logits(model), expected)
    other = {name: tensor for name, tensor in state.items() if "lora_" not in name and "embed" in name}
    model.merge_adapter()
    model.load_state_dict(other, strict=False)
    assert all(layer.merged for layer in adapters(model).values())
