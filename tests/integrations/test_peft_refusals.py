"""What BoRA as a method of PEFT refuses, before anything changes: options, layers, several adapters, conversions."""

import pytest
import torch
from helpers.peft_models import (
    bora_layers,
    make_base,
    make_peft,
)
from torch import nn

peft = pytest.importorskip("peft")
from peft import LoraConfig, inject_adapter_in_model  # noqa: E402

from bora_kernels.integrations.peft import BoraConfig  # noqa: E402


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm_order": "rows"}, "norm_order must be one of row_col, col_row, got 'rows'"),
        ({"detach_norm": 1}, "detach_norm must be True, False or None, got 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"init_lora_weights": "eva"}, "init_lora_weights must be True, .* got 'eva'"),
        ({"init_lora_weights": "pissa_4"}, "init_lora_weights must be True, .* got 'pissa_4'"),
        ({"lora_bias": True}, "lora_bias is not supported with BoRA"),
        ({"use_qalora": True}, "use_qalora is not supported with BoRA"),
        ({"target_parameters": ["weight"]}, "target_parameters is not supported with BoRA"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens is not supported"),
        ({"kasa_config": {}}, "kasa_config is not supported with BoRA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BoraConfig(**options)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def sharded():
    linear = nn.Linear(4, 4)
    linear._hf_tp_plan = "colwise"
    return linear


UNFIT = {
    "tensor parallel": sharded,
    "norm": lambda: nn.LayerNorm(4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 4, 3),
    "groups": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "max_norm": lambda: nn.Embedding(4, 4, max_norm=1.0),
    "scale_grad_by_freq": lambda: nn.Embedding(4, 4, scale_grad_by_freq=True),
    "own forward": lambda: Doubled(4, 4),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "float8 weight": lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT.keys())
def test_unfit_layers_are_refused_before_anything_changes(unfit):
    base = nn.ModuleDict({"fit": nn.Linear(4, 4), "unfit": unfit()})
    before = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=r"Target module unfit .* is not supported: .*BoRA adapts Linear, Conv1D"):
        make_peft(base, target_modules=["fit", "unfit"])
    assert [type(module) for module in base.modules()] == before
    assert base["fit"].weight.requires_grad


def test_olora_is_refused_for_transposed_weights():
    with pytest.raises(ValueError, match="olora.* untransposed"):
        make_peft(make_base("gpt2"), init_lora_weights="olora")


def test_adapters_of_other_methods_are_not_mixed_into_a_layer():
    model = make_base()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model, "lora")
    with pytest.raises(ValueError, match="must have BoRA adapters only, got a Linear"):
        inject_adapter_in_model(BoraConfig(target_modules=["q_proj"]), model, "bora")
    model = make_base()
    inject_adapter_in_model(BoraConfig(target_modules=["q_proj"]), model, "bora")
    with pytest.raises(TypeError, match="config must be a BoraConfig .* got LoraConfig"):
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model, "lora")


def test_tied_adapters_are_refused():
    base = make_base(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="ensure_weight_tying cannot tie"):
        make_peft(base, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    assert not bora_layers(base)


def test_several_adapters_at_once_are_refused():
    model = make_peft(make_base())
    model.add_adapter("other", model.peft_config["default"])
    for call in (model.base_model.set_adapter, next(iter(bora_layers(model).values())).set_adapter):
        with pytest.raises(ValueError, match="must name one adapter, got .*'default', 'other'"):
            call(["default", "other"])
    for call in (model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(ValueError, match="must name one adapter"):
            call(adapter_names=["default", "other"])
    assert model.active_adapters == ["default"] and not next(iter(bora_layers(model).values())).merged
    with pytest.raises(NotImplementedError, match="add_weighted_adapter is not defined for BoRA"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    assert set(model.peft_config) == {"default", "other"}


def test_conversions_to_lora_are_refused(tmp_path):
    model = make_peft(make_base(), init_lora_weights="pissa")
    assert not model.supports_lora_conversion()
    with pytest.raises(NotImplementedError, match="path_initial_model_for_weight_conversion is not supported"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
