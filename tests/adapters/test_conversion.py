"""convert: which layers it takes, what it leaves alone, and what it refuses before anything changes."""

import copy
import inspect
import warnings
from typing import get_args

import pytest
import torch
from torch import nn

from bora_kernels import FusedBoraLinear, convert, merge_adapter
from bora_kernels.adapters.conversion import METHODS, LayerOptions, Method, adapted_layers

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, 12), "down": nn.Linear(12, WIDTH)})

    def forward(self, x):
        x = self.k_proj(self.q_proj(self.norm(x)))
        return x + self.mlp["down"](self.mlp["up"](x).relu())


class Model(nn.Module):
    """Two blocks between an embedding and a head that shares its weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(WIDTH, 10, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


IDS = torch.arange(10).view(2, 5)
BLOCK = ("q_proj", "k_proj", "mlp.up", "mlp.down")
EVERY = {f"blocks.{i}.{name}" for i in range(2) for name in BLOCK}
CHOICES = {
    "all-linear": ({}, EVERY),
    "all-linear-upper-case": ({"target_modules": "ALL-LINEAR"}, EVERY),
    "ends": ({"target_modules": ["q_proj", "mlp.up"]}, {n for n in EVERY if n.endswith(("q_proj", "up"))}),
    "whole-name": ({"target_modules": ("blocks.1.k_proj",)}, {"blocks.1.k_proj"}),
    "regex": ({"target_modules": r"blocks\.0\..*_proj"}, {"blocks.0.q_proj", "blocks.0.k_proj"}),
    "head-by-name": ({"target_modules": ["lm_head"]}, {"lm_head"}),
    "exclude-ends": ({"exclude": ["mlp.up", "q_proj"]}, {n for n in EVERY if n.endswith(("down", "k_proj"))}),
    "exclude-regex": ({"exclude": r"blocks\.0\..*"}, {f"blocks.1.{name}" for name in BLOCK}),
}


@pytest.mark.parametrize("arguments, expected", CHOICES.values(), ids=CHOICES)
def test_layers_that_are_converted(arguments, expected):
    model = Model()
    assert convert(model, r=2, **arguments) is model
    assert adapted_layers(model).keys() == expected


@pytest.mark.parametrize("method, cls", METHODS.items(), ids=METHODS)
def test_converted_model_starts_as_the_frozen_one_and_trains_adapters_only(method, cls):
    model = Model()
    expected, weights = model(IDS), {id(parameter) for parameter in model.parameters()}
    convert(model, 3, 6, method=method, norm_order="col_row", rslora=True, dropout=0.25, adapter_dtype=torch.float64)
    model.eval()
    torch.testing.assert_close(model(IDS), expected)
    for layer in adapted_layers(model).values():
        assert type(layer) is cls and layer.lora_A.dtype == torch.float64
        assert (layer.r, layer.alpha, layer.rslora, layer.dropout, layer.norm_order) == (3, 6, True, 0.25, "col_row")
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    magnitudes = {"bora": {"magnitude_row", "magnitude_col"}, "dora": {"magnitude_row"}, "columns": {"magnitude_col"}}
    assert trained == {"lora_A", "lora_B"} | magnitudes[method]
    assert weights == {id(p) for p in model.parameters() if not p.requires_grad}, "weights were copied"


def test_mode_is_kept():
    model = Model()
    model.blocks[0].eval()
    convert(model)
    assert not model.blocks[0].q_proj.training and model.blocks[1].q_proj.training


def test_several_calls_give_several_ranks():
    model = convert(convert(Model(), r=2, target_modules=["q_proj"]), r=4, target_modules=["mlp.up"])
    assert {name.rpartition(".")[2]: layer.r for name, layer in adapted_layers(model).items()} == {"q_proj": 2, "up": 4}
    assert all(layer.lora_A.requires_grad for layer in adapted_layers(model).values())


def test_shared_layer_stays_one_layer():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["a_again"], model["inner"] = model["a"], nn.ModuleList([model["a"]])
    convert(model, r=2)
    assert isinstance(model["a"], FusedBoraLinear) and model["a"] is model["a_again"] is model["inner"][0]
    assert adapted_layers(model).keys() == {"a", "b"}


def test_shared_layer_is_left_out_by_any_of_its_names():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["again"] = model["a"]
    convert(model, r=2, exclude=["again"])
    assert adapted_layers(model).keys() == {"b"}


def test_tied_weight_stays_tied():
    model = convert(Model(), r=2, target_modules=["lm_head"])
    assert model.lm_head.weight is model.embedding.weight and not model.embedding.weight.requires_grad


def test_meta_device():
    model = convert(Model().to("meta"), r=2)
    assert all(parameter.is_meta for parameter in model.parameters())


# ---- modules of PyTorch that read weights without calling layers ----


def encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def test_transformer_encoder_keeps_its_adapters_in_inference_mode():
    """In inference mode, PyTorch's encoder would compute with the frozen weights of its linear layers."""
    model = convert(encoder(), r=2)
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"linear1", "linear2"}
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B)
    x, padding = torch.randn(3, 4, WIDTH), torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 4])
    expected = model(x, src_key_padding_mask=padding).detach()
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)


def test_attention_output_is_refused_by_name():
    with pytest.raises(ValueError, match="layers.0.self_attn.out_proj: MultiheadAttention never calls it"):
        convert(encoder(), target_modules=["out_proj"])


# ---- transformers ----


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes), transformers


def test_llama_all_linear_is_seven_layers_a_block(llama):
    config, transformers = llama
    model = convert(transformers.LlamaForCausalLM(config), r=2)
    assert len(adapted_layers(model)) == 2 * 7 and type(model.lm_head) is nn.Linear


def test_classifier_of_transformers_is_left_out(llama):
    config, transformers = llama
    model = convert(transformers.LlamaForSequenceClassification(config), r=2)
    assert len(adapted_layers(model)) == 2 * 7 and type(model.score) is nn.Linear


def test_converted_llama_compiles_without_a_graph_break(llama):
    config, transformers = llama
    config.num_hidden_layers = 1  # the compiler takes its time for each
    model = convert(transformers.LlamaForCausalLM(config), r=2)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    ids = torch.arange(12).view(2, 6)
    expected = model(ids, labels=ids).loss
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)


# ---- errors ----


def parametrized():
    model = Model()
    nn.utils.parametrizations.weight_norm(model.blocks[1].q_proj)
    return model


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


ERRORS = {
    "model": (lambda: "model", {}, TypeError, "model must be a torch.nn.Module, got str"),
    "bare-linear": (lambda: nn.Linear(3, 3), {}, ValueError, "target_modules must leave a layer to convert"),
    "no-linear": (
        lambda: nn.Sequential(nn.ReLU()),
        {"target_modules": ["q"]},
        ValueError,
        r"target_modules must name torch.nn.Linear layers \(it has none\), got 'q'",
    ),
    "method": (Model, {"method": "vera"}, ValueError, "method must be one of bora, dora, columns, got 'vera'"),
    "unknown-name": (
        Model,
        {"target_modules": ["q_proj", "v_proj"]},
        ValueError,
        r"target_modules must name .* \(q_proj, k_proj, up, down, lm_head\), got 'v_proj'",
    ),
    "no-linear-name": (Model, {"target_modules": ["norm"]}, ValueError, "target_modules must name .* got 'norm'"),
    "regex-is-for-whole-names": (Model, {"target_modules": "q_proj"}, ValueError, "must name .* got 'q_proj'"),
    "no-names": (Model, {"target_modules": []}, ValueError, r"must leave a layer to convert, got \(\)"),
    "names-type": (Model, {"target_modules": [1]}, TypeError, r"target_modules must be a string or several, got \(1,"),
    "exclude-type": (Model, {"exclude": [None]}, TypeError, "exclude must be a string or several"),
    "all-excluded": (
        Model,
        {"target_modules": ["q_proj"], "exclude": ["q_proj"]},
        ValueError,
        r"must leave a layer to convert, got \('q_proj',\) with exclude=\('q_proj',\)",
    ),
    "rank": (Model, {"r": 0}, ValueError, "r must be an integer of at least 1, got 0"),
    "alpha": (Model, {"alpha": float("inf")}, ValueError, "scaling must be finite, got inf"),
    "norm_order": (Model, {"norm_order": "row"}, ValueError, "norm_order must be one of row_col, col_row, got 'row'"),
    "option": (
        Model,
        {"dropuot": 0.1, "alpah": 8},
        TypeError,
        "keywords must be among r, alpha, .*, dropout, .*, got alpah, dropuot",
    ),
    "own-forward": (
        lambda: nn.Sequential(nn.Linear(3, 3), Scaled(3, 3)),
        {},
        ValueError,
        "must not name 1: a Scaled has a forward of its own",
    ),
    "parametrized": (parametrized, {}, ValueError, "must not name blocks.1.q_proj: its weight is computed"),
    "last-layer": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64)),
        {},
        TypeError,
        "linear.weight must be float32, bfloat16, float16 or float64, got torch.complex64",
    ),
}


@pytest.mark.parametrize("make, arguments, error, message", ERRORS.values(), ids=ERRORS)
def test_errors_leave_the_model_alone(make, arguments, error, message):
    model = make()
    before = description(model)
    with pytest.raises(error, match=message):
        convert(model, **arguments)
    assert description(model) == before


def description(model):
    """Modules, and parameters with their flags."""
    if not isinstance(model, nn.Module):
        return model
    return list(model.named_modules()), [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def test_what_convert_takes_is_what_layers_take():
    assert tuple(METHODS) == get_args(Method)
    accepted = inspect.signature(FusedBoraLinear.from_linear).parameters.keys()
    assert accepted == {"linear", "r", "alpha", *LayerOptions.__annotations__}


def test_save_pretrained_of_a_converted_model_warns(tmp_path):
    """It is the base model that ``from_pretrained`` gives back; a merged model is saved without a word."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    model = copy.deepcopy(convert(transformers.BertModel(config), r=2))
    with pytest.warns(
        UserWarning, match=r"save_adapter\(model, folder\) writes what was trained; for a plain model call"
    ):
        model.save_pretrained(tmp_path / "converted")
    assert (tmp_path / "converted" / "config.json").exists()
    merge_adapter(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "merged")
    ids = torch.arange(6).view(2, 3)
    again = transformers.BertModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(ids).last_hidden_state, model.eval()(ids).last_hidden_state)
