"""Base layers whose call something waits for, or that something replaces: hooks, casting, fake quantization."""

import functools

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from helpers.accuracy import assert_equal
from helpers.four_kinds import IDS, Model, adapted, trained  # noqa: E402

from bora_kernels import convert  # noqa: E402
from bora_kernels.integrations.peft import through  # noqa: E402

# ---- hooks ----


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["tokens", "up", "conv", "down"])
def test_hooks_of_a_base_layer_see_inputs_and_adapted_outputs(name, when):
    model, expected, seen = Model(), trained(adapted(Model())), []

    def hook(layer):
        layer.register_forward_pre_hook(lambda module, arguments: (seen.append(arguments[0]), None)[1])
        layer.register_forward_hook(lambda module, arguments, output: (seen.append(output), output * 2)[1])

    if when == "before":
        hook(model.get_submodule(name))
    model = trained(adapted(model))
    if when == "after":
        hook(model.base_model.model.get_submodule(name).base_layer)
    outputs = []
    expected.base_model.model.get_submodule(name).register_forward_hook(
        lambda module, arguments, output: (outputs.extend([arguments[0], output]), output * 2)[1]
    )
    assert torch.equal(model(IDS), expected(IDS))
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(seen, outputs, strict=True))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_hook_on_a_factor_which_is_never_called_is_warned_of_once(register, factor, monkeypatch):
    monkeypatch.setattr(through, "_warned_of_hooks", set())
    model = trained(adapted(Model()))
    expected = model(IDS)
    for name in ("up", "down"):
        layer = model.base_model.model.get_submodule(name)
        getattr(getattr(layer, factor).default, register)(lambda *arguments: torch.zeros(()))
    with pytest.warns(UserWarning, match="hooks on lora_A or lora_B of up are not called") as caught:
        assert torch.equal(model(IDS), expected)
        model(IDS)
    assert len(caught) == 1


def test_hooks_go_with_a_converted_layer_and_their_handles_stay_good():
    model, seen = Model(), []
    handle = model.up.register_forward_hook(lambda module, arguments, output: seen.append(output))
    convert(model)
    model(IDS)
    assert len(seen) == 1 and seen[0].grad_fn is not None
    handle.remove()
    model(IDS)
    assert len(seen) == 1


def test_a_base_layer_that_is_cast_for_its_call():
    """As layerwise casting does: float8 between calls, another dtype in them."""
    model = trained(adapted(Model(), ["up"]))
    base = model.base_model.model.up.base_layer
    stored = base.weight.data.to(torch.float8_e4m3fn)
    base.weight.data = stored.float()
    expected = model(IDS)

    def cast(dtype):
        base.weight.data = base.weight.data.to(dtype)

    cast(torch.float8_e4m3fn)
    base.register_forward_pre_hook(lambda module, arguments: cast(torch.float32))
    base.register_forward_hook(lambda module, arguments, output: cast(torch.float8_e4m3fn))
    assert torch.equal(model(IDS), expected) and base.weight.dtype == torch.float8_e4m3fn


# ---- diffusers' layerwise casting ----

FLOAT8 = torch.float8_e4m3fn


def cast_layerwise(model, dtype):
    hooks = pytest.importorskip("diffusers.hooks", reason="needs diffusers, of the extra integrations")
    hooks.apply_layerwise_casting(model, FLOAT8, dtype, skip_modules_pattern=["lora_"])
    return model


def rounded(model, layers, dtype):
    """Weights and biases of layers as they come back from their storage."""
    model = model.to(dtype)
    for name, parameter in model.named_parameters():
        if name.replace(".base_layer", "").rpartition(".")[0].rpartition(".")[2] in layers and "lora" not in name:
            parameter.data = parameter.data.to(FLOAT8).to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapted_model_is_cast_layerwise(dtype):
    """Adapters stay wide, and the others are stored in 8 bits between calls; gradients are those of rounded weights."""

    def wide(model):
        model.to(dtype)
        return trained(adapted(model))

    expected = rounded(wide(Model()), ("tokens", "up", "conv", "down"), dtype)
    for name, parameter in wide(Model()).named_parameters():  # adapters as they were, also over a narrow base
        if parameter.requires_grad:
            expected.get_parameter(name).data = parameter.data
    model = cast_layerwise(wide(Model()), dtype)
    assert model.base_model.model.conv.base_layer.weight.dtype == FLOAT8
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    results = [m(IDS).float() for m in (model, expected)]
    assert torch.equal(*results)
    held, wanted = (
        torch.autograd.grad(y.square().sum(), [p for p in m.parameters() if p.requires_grad])
        for y, m in zip(results, (model, expected), strict=True)
    )
    assert len(held) == 4 * 4
    assert_equal(held, wanted)


def test_a_converted_model_is_cast_layerwise_around_its_adapted_layers():
    expected = rounded(trained(convert(Model())), ("tokens", "conv"), torch.float32)
    model = cast_layerwise(trained(convert(Model())), torch.float32)
    assert model.conv.weight.dtype == FLOAT8 and model.up.weight.dtype == torch.float32
    assert torch.equal(model(IDS), expected(IDS))


@pytest.mark.parametrize("target", ["tokens", "up", "conv"])
def test_a_model_that_is_cast_already_is_refused(target):
    model = cast_layerwise(Model(), torch.float32)
    expected = model(IDS)
    with pytest.raises(ValueError, match=f"{target} .* its weight is torch.float8_e4m3fn; .* adapt the model first"):
        adapted(model, [target])
    with pytest.raises(ValueError, match="adapt the model before"):
        convert(model)
    assert torch.equal(model(IDS), expected)


# ---- layers in the place of the base layer ----


class Halved(nn.Linear):
    """What quantization-aware training puts in a layer's place: it multiplies by a function of its weight."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / 2, self.bias)


class Other(nn.Linear):
    def forward(self, x):
        return torch.einsum("...k,nk->...n", x, self.weight)


@pytest.mark.parametrize(
    "kind, message", [(Halved, "weight as it is, got a Halved that changes it"), (Other, "got a Other that does not")]
)
def test_a_base_layer_that_was_replaced_after_adapting_is_refused(kind, message):
    model = adapted(Model(), ["up"])
    model.base_model.model.up.base_layer = kind(12, 20).requires_grad_(False)
    with pytest.raises(ValueError, match=f"base_layer must multiply by its .*{message}"):
        model(IDS)


def test_a_base_layer_that_was_quantized_after_adapting_is_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = adapted(Model(), ["up"])
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: name.endswith("up.base_layer"))
    with pytest.raises(TypeError, match=r"weight must be a plain dense tensor, got a .* \(sharded or quantized\)"):
        model(IDS)


@pytest.fixture(params=["config", "quantizer"])
def prepare(request):
    """torchao's preparation of chosen linear layers for quantization-aware training, by either of its interfaces."""
    qat = pytest.importorskip("torchao.quantization.qat")
    from torchao.quantization import quantize_

    def prepare(model, chosen=lambda module, name: isinstance(module, nn.Linear)):
        if request.param == "quantizer":
            for name, parent in list(model.named_modules()):
                for end, child in parent.named_children():
                    if chosen(child, f"{name}.{end}"):
                        inside = nn.ModuleDict({"0": child})
                        setattr(parent, end, qat.Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(inside)["0"])
            return model
        weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
        quantize_(model, qat.QATConfig(weight_config=weights, step="prepare"), chosen)
        return model

    return prepare


def two_linear():
    torch.manual_seed(0)
    return nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 32, bias=False)})


def call_two(model, x):
    return model["down"](model["up"](x).relu())


@pytest.mark.parametrize("adapt", [adapted, convert], ids=["peft", "convert"])
def test_a_model_prepared_for_quantization_aware_training_is_refused(prepare, adapt):
    model, x = prepare(two_linear()), torch.randn(3, 64)
    expected = call_two(model, x)
    with pytest.raises(ValueError, match="up.* rounds its weight in each call .quantization-aware training., not the"):
        adapt(model, target_modules=["up"]) if adapt is convert else adapt(model, ["up"])
    assert torch.equal(call_two(model, x), expected)


def test_preparing_an_adapted_layer_of_peft_is_refused_when_it_is_called(prepare):
    model = trained(adapted(two_linear(), ["up"]))
    prepare(model, lambda module, name: name.endswith("up.base_layer"))
    with pytest.raises(ValueError, match="got a .*QAT.*|Fake.* that changes it: .* leave adapted layers out of it"):
        call_two(model.base_model.model, torch.randn(3, 64))


def test_preparing_leaves_converted_layers_as_they_are(prepare):
    model, x = trained(convert(two_linear(), target_modules=["up"])), torch.randn(3, 64)
    hidden, before = model["up"](x), call_two(model, x)
    prepare(model)
    assert torch.equal(model["up"](x), hidden)
    change = (call_two(model, x) - before).norm() / before.norm()
    assert 0.01 < change < 0.3  # of the other layer
    call_two(model, x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model["up"].parameters() if p.requires_grad)


# ---- quantized layers ----


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_hooks_of_a_quantized_base_layer_are_called(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = (
        bitsandbytes.nn.Linear4bit(64, 32)
        if kind == "nf4"
        else bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    )
    model = trained(adapted(nn.Sequential(linear.to("cpu")), ["0"]))
    x, seen = torch.randn(3, 64), []
    expected = model(x)
    base = model.base_model.model[0].base_layer
    base.register_forward_hook(lambda module, arguments, output: seen.extend([arguments[0], output]))
    assert torch.equal(model(x), expected)
    assert torch.equal(seen[0], x) and torch.equal(seen[1], expected) and "forward" not in base.__dict__


def test_an_offloaded_quantized_base_layer_is_refused():
    """What waits for its call would be fetched, and the packed weight is read without."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = adapted(nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32).to("cpu")), ["0"])
    base = model.base_model.model[0].base_layer
    base.forward = functools.partial(type(base).forward, base)  # as accelerate's hooks and others replace it
    with pytest.raises(ValueError, match="got a quantized Linear4bit that is offloaded"):
        model(torch.randn(3, 64))
