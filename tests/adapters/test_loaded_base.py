"""Base weights that are loaded after the model was adapted, as people do with LoRA."""

import copy
import warnings

import pytest
import torch
from helpers.adapted_models import K, methods
from torch import nn

from bora_kernels import convert, reuse_scales

X = torch.linspace(-2, 1, 4 * K).view(4, K)

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def network(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(K, 20), nn.Tanh(), nn.Linear(20, 5, bias=False)).to(dtype)


def load(model, base, **options):
    """What others are warned of fails here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(base.state_dict(), strict=False, **options)


@methods
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_layer_starts_as_the_loaded_weight(method, assign, dtype):
    pretrained, model = network(1, dtype), convert(network(0, dtype), r=3, method=method, adapter_dtype=dtype)
    parameter, x = model[0].lora_B, X.to(dtype)
    model[0].merge()
    with reuse_scales():
        model(x)
        load(model, pretrained, assign=assign)
        torch.testing.assert_close(model(x), pretrained(x), **TOLERANCE[dtype])
    assert model[0].lora_B is parameter
    expected = convert(copy.deepcopy(pretrained), r=3, method=method, adapter_dtype=dtype)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            assert torch.equal(p, expected.get_parameter(name))


def test_trained_magnitudes_stay_with_a_warning():
    model = convert(network(0), r=3)
    with torch.no_grad():
        model[2].magnitude_col[1] *= 1.01
    before = model[2].magnitude_col.clone()
    with pytest.warns(UserWarning, match="a base weight was loaded into an adapted layer without its adapter"):
        model.load_state_dict(network(1).state_dict(), strict=False)
    assert torch.equal(model[2].magnitude_col, before)


def test_the_same_weights_and_whole_states_say_nothing():
    model = convert(network(0), r=3)
    with torch.no_grad():
        model[0].magnitude_row *= 2
        model[0].lora_B += 1
    trained = copy.deepcopy(model)
    load(model, network(0))
    load(model, trained)
    other = convert(network(1), r=3)
    load(other, trained)
    assert torch.equal(other(X), trained(X))


def test_garbage_of_empty_memory_is_warned_of():
    with torch.device("meta"):
        model = convert(network(0), r=3)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="reset_parameters"):
        model.load_state_dict(network(1).state_dict(), strict=False)


class TestPeft:
    KINDS = {
        "linear": (lambda: nn.Linear(K, 6), X),
        "embedding": (lambda: nn.Embedding(9, 5), torch.arange(6)),
        "convolution": (lambda: nn.Conv1d(2, 5, 3), X[:, None].expand(4, 2, K)),
    }

    @staticmethod
    def adapted(make, **options):
        peft = pytest.importorskip("peft")
        from bora_kernels.integrations.peft import BoraConfig

        config = BoraConfig(r=2, lora_alpha=3, target_modules=["0"], **options)
        return peft.get_peft_model(nn.Sequential(make()), config)

    @staticmethod
    def renamed(base):
        return {name.replace("0.", "0.base_layer."): tensor for name, tensor in base.state_dict().items()}

    @pytest.mark.parametrize("kind", KINDS)
    def test_untrained_layers_start_as_the_loaded_weight(self, kind):
        make, x = self.KINDS[kind]
        pretrained, model = nn.Sequential(make()), self.adapted(make)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.base_model.model.load_state_dict(self.renamed(pretrained), strict=False)
        torch.testing.assert_close(model(x), pretrained(x), rtol=1e-5, atol=1e-6)

    def test_trained_and_moved_layers_are_warned_of(self):
        make, _ = self.KINDS["linear"]
        trained, moved = self.adapted(make), self.adapted(make, init_lora_weights="pissa")
        with torch.no_grad():
            trained.base_model.model[0].lora_magnitude_vector_row.default.weight[2] += 1
        for model in (trained, moved):
            before = model.base_model.model[0].lora_magnitude_vector_row.default.weight.clone()
            with pytest.warns(UserWarning, match="loaded into an adapted layer without its adapter"):
                model.base_model.model.load_state_dict(self.renamed(nn.Sequential(make())), strict=False)
            assert torch.equal(model.base_model.model[0].lora_magnitude_vector_row.default.weight, before)
