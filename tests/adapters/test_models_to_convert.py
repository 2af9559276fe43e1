"""What a model may be when it is converted: adapted or wrapped by others, with weights that no linear layer holds."""

import copy
import warnings

import pytest
import torch
from torch import nn

from bora_kernels import convert, explain, load_adapter, save_adapter

peft = pytest.importorskip("peft")
from transformers.pytorch_utils import Conv1D  # noqa: E402

from bora_kernels.integrations.peft import BoraConfig  # noqa: E402


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def state_of(model):
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [peft.LoraConfig, BoraConfig, peft.LoHaConfig])
@pytest.mark.parametrize("targets", ["all-linear", ["2"]])
def test_a_model_with_adapters_of_peft_is_refused(config, targets):
    model = peft.get_peft_model(network(), config(r=2, target_modules=["0"]))
    before = state_of(model)
    with pytest.raises(ValueError, match="model must have no adapters of PEFT, got a .* as base_model.model.0"):
        convert(model, r=2, target_modules=targets)
    assert state_of(model) == before
    merged = convert(model.merge_and_unload(), r=2)
    assert sum(p.requires_grad for p in merged.parameters()) == 8


@pytest.mark.parametrize("targets", ["all-linear", ["2"]])
def test_peft_over_a_converted_model_is_refused(targets):
    model = convert(network(), r=2, target_modules=["0"])
    before = state_of(model)
    with pytest.raises(ValueError, match="model must have no layers of bora_kernels.convert, got one as 0"):
        peft.get_peft_model(model, BoraConfig(r=2, target_modules=targets))
    assert state_of(model) == before


class TestDistributedDataParallel:
    @pytest.fixture(autouse=True)
    def group(self, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("inside", [False, True])
    def test_one_that_is_there_already_is_refused(self, inside):
        wrapped = nn.parallel.DistributedDataParallel(network())
        model = nn.ModuleDict({"inner": wrapped}) if inside else wrapped
        before = state_of(model)
        with pytest.raises(ValueError, match="adapted before it is wrapped, got DistributedDataParallel"):
            convert(model, r=2)
        assert state_of(model) == before

    def test_loading_makes_no_new_layers_inside_and_fills_those_that_are_there(self, tmp_path):
        model = convert(network(), r=2)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        model[0].lora_B.data.fill_(0.5)
        save_adapter(model, tmp_path / "adapter")
        with pytest.raises(ValueError, match="adapted before it is wrapped"):
            load_adapter(nn.parallel.DistributedDataParallel(network()), tmp_path / "adapter")
        load_adapter(wrapped, tmp_path / "adapter")
        assert torch.equal(wrapped.module[0].lora_B, model[0].lora_B)


@pytest.mark.parametrize("way", ["convert", "peft"])
def test_a_layer_without_a_weight_yet_is_refused_by_name(way):
    model = nn.ModuleDict({"early": nn.LazyLinear(3), "late": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"early.*its weight is made in its first call"):
        if way == "convert":
            convert(model, r=2)
        else:
            peft.get_peft_model(model, BoraConfig(r=2, target_modules=["early"]))
    model["early"](torch.ones(1, 4))
    assert convert(model, r=2)["early"].in_features == 4


HOLDERS = {
    "attention": (lambda: nn.MultiheadAttention(4, 2), {"inner.in_proj_weight": "MultiheadAttention"}),
    "attention of three": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3),
        {f"inner.{part}_proj_weight": "MultiheadAttention" for part in "qkv"},
    ),
    "recurrent": (
        lambda: nn.GRU(4, 4, bidirectional=True),
        {f"inner.weight_{part}_l0{end}": "GRU" for end in ("", "_reverse") for part in ("ih", "hh")},
    ),
    "cell": (lambda: nn.LSTMCell(4, 4), {"inner.weight_ih": "LSTMCell", "inner.weight_hh": "LSTMCell"}),
    "Conv1D": (lambda: Conv1D(4, 4), {"inner.weight": "Conv1D"}),
}


@pytest.mark.parametrize("way", ["convert", "peft"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_weights_that_no_linear_layer_holds_are_named(way, holder):
    make, weights = HOLDERS[holder]
    model = nn.ModuleDict({"inner": make(), "last": nn.Linear(4, 4)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "convert":
            convert(model, r=2)
        else:
            model = peft.get_peft_model(model, BoraConfig(r=2, target_modules="all-linear"))
    said = [str(w.message) for w in caught if next(iter(weights)) in str(w.message)]
    if way == "peft":
        weights = {} if holder == "Conv1D" else {f"base_model.model.{name}": kind for name, kind in weights.items()}
    assert len(said) == bool(weights)
    assert dict(explain(model).others) == weights
    assert all(f"without an adapter: {name.replace('0', '*')}" in str(explain(model)) for name in weights)


def test_nothing_is_said_of_targets_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.ModuleDict({"inner": nn.GRU(4, 4), "last": nn.Linear(4, 4)}), r=2, target_modules=["last"])


def test_why_no_layer_is_left_to_convert():
    with pytest.raises(ValueError, match="Conv1D of transformers, which BoraConfig"):
        convert(nn.Sequential(Conv1D(4, 4)), r=2)
    with pytest.raises(ValueError, match="its layers are adapted already"):
        convert(convert(network(), r=2), r=2)
    with pytest.raises(ValueError, match=r"got 'all-linear' with exclude=\(\)$"):
        convert(nn.Sequential(nn.ReLU()), r=2)


@pytest.mark.parametrize("exclude, named", [(["inner", "0"], "inner"), (r"inner\..*", "inner"), (["ner.0"], "ner.0")])
def test_what_excludes_nothing_is_warned_of(exclude, named):
    model = nn.ModuleDict({"inside": network(), "last": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match=f"exclude leaves out no linear layer by '{named}") as caught:
        convert(model, r=2, exclude=exclude)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_what_is_excluded_may_be_adapted_already():
    model = convert(network(), r=2, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, r=3, exclude=["0"])
    assert (model[0].r, model[2].r) == (2, 3)
