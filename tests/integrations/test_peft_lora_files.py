"""Adapters as LoRA: PEFT's own conversion, this package's for every kind of layer, and files that plain PEFT loads."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers.peft_models import LAYERS, TOKENS, Layers, bora_layers, make_base, make_ids, make_peft, train_a_little
from torch import nn

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

import bora_kernels  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig, convert_to_lora, save_as_lora  # noqa: E402
from bora_kernels.quantized import read  # noqa: E402

MEMBERS = {"bora": {}, "dora": {"use_dora": True}, "columns": {"columns_only": True}}
members = pytest.mark.parametrize("member", MEMBERS)


def products(model):
    """B·A of each LoRA layer [N, K·taps], as the layer scales it."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            embedding = len(layer.lora_embedding_A) > 0
            A, B = (layer.lora_embedding_A, layer.lora_embedding_B) if embedding else (layer.lora_A, layer.lora_B)
            A, B = (t["default"] if embedding else t["default"].weight.flatten(1) for t in (A, B))
            found[name] = layer.scaling["default"] * (B @ A)
    return found


# ---- PEFT's own conversion ----


@members
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_conversion_by_peft_at_full_rank_is_the_adapted_model(kind, member, tmp_path):
    model = make_peft(make_base(kind), **MEMBERS[member])
    assert model.supports_lora_conversion()
    config, state = peft.convert_to_lora(model, rank=32)
    other = get_peft_model(make_base(kind), config)
    assert not set_peft_model_state_dict(other, state).unexpected_keys
    ids = make_ids()
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    peft.save_as_lora(tmp_path, model, rank=0.99)
    loaded = PeftModel.from_pretrained(make_base(kind), tmp_path)
    change = (loaded(ids).logits - make_base(kind)(ids).logits).norm()
    assert (loaded(ids).logits - model(ids).logits).norm() < 0.3 * change


def test_the_change_of_a_layer(tmp_path):
    model = make_peft(make_base(), lora_alpha=4)
    layer = next(iter(bora_layers(model).values()))
    merged, weight = layer.effective_weight("default"), layer.get_base_layer().weight
    torch.testing.assert_close(layer.get_delta_weight("default"), merged - weight, rtol=1e-4, atol=1e-6)
    layer.set_scale("default", 0.25)
    torch.testing.assert_close(layer.get_delta_weight("default"), (merged - weight) / 4, rtol=1e-4, atol=1e-6)
    change = layer.get_delta_weight("default")
    layer.merge()
    assert torch.equal(layer.get_delta_weight("default"), change)
    layer.unmerge()
    with pytest.raises(ValueError, match="adapter must be one of default, got 'other'"):
        layer.get_delta_weight("other")


def test_peft_refuses_to_convert_what_is_no_matrix():
    model = make_peft(Layers(), target_modules=LAYERS)
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="BoraEmbedding"):
        peft.convert_to_lora(model, rank=2)


# ---- by rank and error, every kind of layer ----


@pytest.mark.parametrize("bound", [{"rank": 40}, {"rank": 2}, {"error": 0.3}], ids=str)
def test_every_kind_of_layer_is_converted(bound, tmp_path):
    base = Layers().eval()
    base_weights = {name: t.clone() for name, t in base.state_dict().items()}
    model = make_peft(copy.deepcopy(base), target_modules=LAYERS)
    report = save_as_lora(model, tmp_path, **bound, verbose=False)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig and not loaded.peft_config["default"].use_dora
    adapted = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, product in products(loaded).items():
        change = adapted[f"{name}.weight"] - base_weights[f"{name}.weight"]
        change = change.T if name in ("embedding", "transposed") else change.flatten(1)
        layer = next(layer for layer in report.layers if layer.name == name)
        assert layer.change == pytest.approx(change.norm().item(), rel=1e-4)
        assert layer.lost == pytest.approx((change - product).norm().item(), rel=1e-3, abs=1e-5)
        assert layer.error <= bound.get("error", 1.0)
    assert len(report.layers) == len(LAYERS)
    if bound == {"rank": 40}:
        assert report.error < 1e-6
        torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_a_named_adapter_beside_another_and_a_trained_module(tmp_path):
    base = make_base("bert")
    model = make_peft(copy.deepcopy(base), target_modules=["query"])
    model.add_adapter("news", BoraConfig(r=3, target_modules=["value", "dense"], modules_to_save=["decoder"]))
    train_a_little(model, "news", seed=5)
    model.set_adapter("news")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.news" in name:
                parameter += 0.1
    report = save_as_lora(model, tmp_path, rank=32, adapter_name="news", verbose=False)
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"value", "dense"}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(make_ids()).logits, model(make_ids()).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="adapter_name must be one of default, news, got 'old'"):
        save_as_lora(model, tmp_path, rank=2, adapter_name="old")


def test_an_adapter_of_pefts_own_dora_by_way_of_its_file(tmp_path):
    dora = get_peft_model(make_base(), LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"]))
    train_a_little(dora)
    dora.save_pretrained(tmp_path / "dora")
    converted = bora_kernels.load_adapter(make_base(), tmp_path / "dora")
    bora_kernels.save_as_lora(converted, tmp_path / "lora", rank=32, verbose=False)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "lora")
    torch.testing.assert_close(loaded(make_ids()).logits, dora.eval()(make_ids()).logits, rtol=1e-4, atol=1e-4)


REFUSED = {
    "bias": ({"bias": "all"}, "bias must be none to write LoRA, got 'all'"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices must be None to write LoRA"),
    "pissa": (
        {"init_lora_weights": "pissa"},
        "must leave the base weight as it was, got 'pissa' in base_model.model.model.layers.0",
    ),
    "olora": ({"init_lora_weights": "olora"}, "must leave the base weight as it was, got 'olora'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_lora_cannot_hold_is_refused(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        save_as_lora(make_peft(make_base(), target_modules=["q_proj"], **options), tmp_path / "lora", rank=2)
    assert not (tmp_path / "lora").exists()
    with pytest.raises(ValueError, match="for a model of PEFT there is bora_kernels.integrations.peft.save_as_lora"):
        bora_kernels.save_as_lora(make_peft(make_base()), tmp_path / "lora", rank=2)


def test_over_a_quantized_base(tmp_path):
    """W0 is what the quantized weight stands for, so that the file fits the model that was trained."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def quantized():
        torch.manual_seed(0)
        linear = nn.Linear(64, 96)
        layer = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(linear.state_dict())
        return nn.Sequential(layer.to("cpu")).train()

    x = torch.randn(5, 64)
    model = make_peft(quantized(), target_modules=["0"])
    save_as_lora(model, tmp_path / "peft", rank=64, verbose=False)
    converted = bora_kernels.convert(quantized(), r=4, alpha=8, target_modules=["0"])
    with torch.no_grad():
        converted[0].lora_B += 0.2
        converted[0].magnitude_col *= 1.1
    bora_kernels.save_as_lora(converted, tmp_path / "converted", rank=64, verbose=False)
    changes = {"peft": next(iter(bora_layers(model).values())).get_delta_weight("default")}
    changes["converted"] = converted[0].delta_weight().float()
    for folder, change in changes.items():
        loaded, plain = PeftModel.from_pretrained(quantized(), tmp_path / folder).train(), quantized()
        torch.testing.assert_close(loaded(x) - plain(x), x @ change.T, rtol=1e-4, atol=1e-4)
        W0 = read(plain[0]).dense(torch.float32)
        adapted = {"peft": model, "converted": converted}[folder]
        torch.testing.assert_close(adapted(x), x @ (W0 + change).T + plain[0].bias, rtol=1e-4, atol=1e-4)


# ---- in a process without this package ----

PLAIN = """
import json, sys, torch
sys.modules["bora_kernels"] = None
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel

ids, folders = json.loads(sys.argv[1]), sys.argv[3:]
found = {}
for folder in folders:
    base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
    model = PeftModel.from_pretrained(base, folder)
    assert {c.peft_type for c in model.peft_config.values()} == {"LORA"}
    found[folder] = model(torch.tensor(ids)).logits
found["auto"] = AutoPeftModelForCausalLM.from_pretrained(folders[0]).eval()(torch.tensor(ids)).logits
torch.save(found, sys.argv[2] + "/logits.pt")
"""


def test_files_load_in_plain_peft_without_this_package(tmp_path):
    base, ids = make_base(), make_ids()
    base.save_pretrained(tmp_path / "base")

    def fresh():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    expected = {}
    for number, options in enumerate(({"rank": 32}, {"error": 0.4}, {"rank": 3})):
        model = bora_kernels.convert(fresh(), r=4, alpha=8)
        model.lm_head.requires_grad_()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(number)
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path / f"converted{number}"
        report = bora_kernels.save_as_lora(model, folder, **options, verbose=False)
        expected[str(folder)] = (model(ids).logits, report.error)
    model = make_peft(fresh(), use_dora=True)
    save_as_lora(model, tmp_path / "peft", rank=32, verbose=False)
    expected[str(tmp_path / "peft")] = (model(ids).logits, 0.0)
    configs = [json.loads((tmp_path / f"converted{n}" / "adapter_config.json").read_text()) for n in (0, 1, 2)]
    assert [bool(config["rank_pattern"]) for config in configs] == [True, True, False]  # the first for k_proj, [16, 32]

    command = [sys.executable, "-c", PLAIN, json.dumps(ids.tolist()), str(tmp_path / "base"), *expected]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "base" / "logits.pt")
    for folder, (logits, error) in expected.items():
        change = (logits - base(ids).logits).norm()
        difference = (found[folder] - logits).norm() / change
        assert difference < 1e-4 if error < 1e-5 else 1e-3 < difference < 1, (folder, difference, error)
    assert torch.equal(found["auto"], found[str(tmp_path / "converted0")])


def test_the_tensors_of_a_model_that_adapters_were_put_into():
    """As diffusers does: no PeftModel around it, and names without its prefix."""
    base = make_base()
    model = copy.deepcopy(base)
    peft.inject_adapter_in_model(BoraConfig(r=4, target_modules=["q_proj", "down_proj"]), model)
    train_a_little(model)
    config, tensors, report = convert_to_lora(model, rank=32, verbose=False)
    assert all(name.startswith("model.layers.") for name in tensors) and len(tensors) == 2 * len(report.layers) == 8
    other = copy.deepcopy(base)
    peft.inject_adapter_in_model(config, other)
    assert not set_peft_model_state_dict(other, tensors).unexpected_keys
    torch.testing.assert_close(other(make_ids()).logits, model(make_ids()).logits, rtol=1e-4, atol=1e-4)
