"""BoRA as a method of PEFT: what it computes, and its options."""

import copy

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.cases import HALVES, NAMES, conventions, orders
from helpers.peft_models import (
    LAYERS,
    MODELS,
    TOKENS,
    Layers,
    bora_layers,
    dense_twin,
    make_base,
    make_ids,
    make_peft,
    train_a_little,
    trained_parameters,
)

peft = pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model  # noqa: E402

from bora_kernels.integrations.peft import BoraConfig, BoraLinear  # noqa: E402

INITS = [True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4"]
models = pytest.mark.parametrize("kind", MODELS)


def run(model, ids, names=None):
    """Output and gradients of the trained parameters, for a fixed quadratic loss."""
    output = model(ids)
    output = getattr(output, "logits", output)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in trained_parameters(model).items()}
    return {"output": output.detach()} | {name: gradients[name] for name in names or gradients}


# ---- what is computed ----


@models
@orders
@conventions
def test_a_model_and_its_gradients_are_those_of_the_reference(kind, order, detach_norm):
    base, ids = make_base(kind), make_ids()
    model = make_peft(copy.deepcopy(base), norm_order=order, detach_norm=detach_norm)
    plain, exact = dense_twin(base, model), dense_twin(base, model).double()
    actual = run(model, ids)
    assert len(actual) > 4 * 8
    assert_accurate(actual, run(plain, ids), run(exact, ids), samples=20)


@models
def test_a_new_adapter_changes_nothing_and_trains_its_parameters_alone(kind):
    base, ids = make_base(kind), make_ids()
    expected = base(ids).logits
    model = make_peft(base, trained=False)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    names = {"lora_A", "lora_B", "lora_magnitude_vector_row", "lora_magnitude_vector_col"}
    trained = trained_parameters(model)
    assert {name.rpartition(".")[2] for name in trained} == names
    assert len(trained) == 4 * len(bora_layers(model)) and all("lora_" in name for name in trained)


@pytest.mark.parametrize("init", INITS, ids=str)
@orders
def test_initializations_start_as_lora_does(init, order):
    """The magnitudes are the norms of W0 + s·B·A, so that any start is LoRA's; PiSSA and OLoRA change W0."""
    results = []
    for config, options in ((BoraConfig, {"norm_order": order}), (LoraConfig, {})):
        base = make_base()
        torch.manual_seed(3)
        options |= {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": init}
        results.append(get_peft_model(base, config(**options))(make_ids()).logits)
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)
    same = torch.allclose(results[0], make_base()(make_ids()).logits, rtol=1e-3, atol=1e-3)
    assert same == (init is not False)


@orders
def test_every_kind_of_layer_starts_as_its_base_and_trains(order):
    base = Layers()
    expected = base(TOKENS)
    model = make_peft(base, target_modules=LAYERS, trained=False, norm_order=order)
    assert len(bora_layers(model)) == len(LAYERS)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
    train_a_little(model)
    assert not torch.allclose(model(TOKENS), expected, rtol=1e-2, atol=1e-2)
    gradients = run(model, TOKENS)
    silent = [name for name, gradient in gradients.items() if not gradient.abs().max() > 0]
    assert not silent and all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("target", LAYERS)
def test_dora_is_that_of_peft(target):
    """Outputs, gradients and five steps of training are PEFT's to a few units in the last place of float32."""
    torch.manual_seed(0)
    base = Layers()
    options = {"r": 4, "lora_alpha": 8, "target_modules": [target], "use_dora": True}
    theirs = train_a_little(get_peft_model(copy.deepcopy(base), LoraConfig(**options)), seed=5)
    ours = get_peft_model(copy.deepcopy(base), BoraConfig(**options))
    with torch.no_grad():
        values = {name.replace("vector", "vector_row"): p for name, p in trained_parameters(theirs).items()}
        assert values.keys() == trained_parameters(ours).keys()
        for name, parameter in trained_parameters(ours).items():
            parameter.copy_(values[name].view_as(parameter))
    exact = copy.deepcopy(ours).double()
    found, plain, truth = [], [], []
    for model, losses in ((ours, found), (theirs, plain), (exact, truth)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            loss = model(TOKENS).square().mean() + model(TOKENS)[0, 0]
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    results = [{"losses": torch.stack(losses)} for losses in (found, plain, truth)]
    assert results[0]["losses"].unique().numel() == 5
    assert_accurate(*results, samples=5, floor=2e-6)


def test_a_zero_weight_row_trains_with_a_finite_loss():
    base = make_base()
    with torch.no_grad():
        base.model.layers[0].self_attn.o_proj.weight[5:9] = 0.0
        base.model.layers[1].mlp.down_proj.weight[:, 3] = 0.0
    model, ids = make_peft(base, trained=False), make_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_adapters_are_float32_over_a_half_precision_base(dtype):
    base = make_base().to(dtype)
    expected = base(make_ids()).logits
    model = make_peft(base, trained=False)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    layer = bora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    exact = layer.base_layer.weight.double().norm(dim=1)
    torch.testing.assert_close(
        layer.lora_magnitude_vector_row["default"].weight.double(), exact, rtol=1e-6, atol=0
    )  # not of the half's precision
    logits = model(make_ids()).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, expected, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_adapters_have_the_bases_dtype_on_request():
    model = get_peft_model(
        make_base().bfloat16(), BoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.bfloat16}
    assert run(model, make_ids())["output"].isfinite().all()


def test_autocast_runs_in_the_autocast_dtype():
    model = make_peft(make_base())
    layer = next(iter(bora_layers(model).values()))
    x = torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)


# ---- options ----


def test_patterns_and_rank_stabilization_set_each_layers_scaling():
    base, ids = make_base(), make_ids()
    options = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"k_proj": 3}}
    model = make_peft(copy.deepcopy(base), use_rslora=True, **options)
    found = {
        name.removeprefix("base_model.model.model.layers."): (layer.r["default"], layer.scaling["default"])
        for name, layer in bora_layers(model).items()
    }
    assert found["0.self_attn.q_proj"] == (2, 8 / 2**0.5)
    assert found["0.self_attn.k_proj"] == (4, 3 / 2)
    assert found["1.mlp.down_proj"] == (6, 8 / 6**0.5) and found["0.mlp.down_proj"] == (4, 4)
    torch.testing.assert_close(model(ids).logits, dense_twin(base, model)(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"exclude_modules": ["q_proj", "lm_head"]}, 2 * 6),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, 2),
        ({"target_modules": r".*\.0\..*proj"}, 7),
    ],
    ids=["exclude_modules", "layers_to_transform", "regex"],
)
def test_layers_are_chosen_as_by_lora(options, expected):
    model = make_peft(make_base(), **options)
    assert len(bora_layers(model)) == expected
    lora = get_peft_model(make_base(), LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))
    assert model.base_model.targeted_module_names == lora.base_model.targeted_module_names


def test_modules_to_save_are_trained_and_saved():
    model = make_peft(make_base(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "lm_head.modules_to_save" in trained_parameters(model)
    saved = peft.get_peft_model_state_dict(model)
    assert "base_model.model.lm_head.weight" in saved and len(saved) == 1 + 2 * 4


def test_bias_may_be_trained():
    model = make_peft(make_base("bert"), target_modules=["query"], bias="lora_only")
    gradients = run(model, make_ids())
    assert sum(name.endswith("base_layer.bias") for name in gradients) == 2
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_dropout_acts_in_training_on_the_low_rank_branch():
    model = make_peft(make_base(), lora_dropout=0.5)
    layer, x = next(iter(bora_layers(model).values())), torch.randn(4, 32)
    model.eval()
    assert torch.equal(layer(x), layer(x))
    model.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("detach_norm", [None, True, False], ids=str)
@pytest.mark.parametrize("use_dora", [False, True], ids=["bora", "dora"])
def test_norms_are_detached_by_default_for_dora_only(detach_norm, use_dora):
    config = BoraConfig(detach_norm=detach_norm, use_dora=use_dora)
    assert config.detach_norm is (use_dora if detach_norm is None else detach_norm)
    assert BoraConfig(**config.to_dict()).detach_norm is config.detach_norm


def test_a_fused_layer_runs_underneath():
    """The layer calls ``bora_linear``, with the backend that it is told."""
    model = make_peft(make_base())
    layer = next(layer for layer in bora_layers(model).values() if isinstance(layer, BoraLinear))
    layer.backend = "nonsense"
    with pytest.raises(ValueError, match="backend must be one of triton, torch, reference"):
        layer(torch.randn(1, 32))
