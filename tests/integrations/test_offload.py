"""Base layers whose call something waits for: offloading by accelerate, hooks, casting, ZeRO stage 3 of DeepSpeed."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # noqa: E402

from bora_kernels import convert  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402

CPU = torch.device("cpu")
IDS = torch.arange(10).view(2, 5)
OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=CPU),
}
offloads = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)


class Model(nn.Module):
    """An embedding, a convolution, and linear layers with and without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.up = nn.Embedding(11, 12), nn.Linear(12, 20)
        self.conv, self.down = nn.Conv1d(20, 6, 3, padding=1), nn.Linear(6, 4, bias=False)

    def forward(self, ids):
        x = self.up(self.tokens(ids)).relu()
        return self.down(self.conv(x.mT).mT)


def adapted(model, targets=("tokens", "up", "conv", "down")):
    torch.manual_seed(1)
    return peft.get_peft_model(model, BoraConfig(r=2, lora_alpha=4, target_modules=list(targets)))


def trained(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def gradients(model):
    model(IDS).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# ---- accelerate ----


@offloads
def test_an_offloaded_model_is_adapted_through_peft(offload, tmp_path):
    base = Model()
    offload(base, tmp_path)
    expected, model = adapted(Model()), adapted(base)
    start = {name: p for name, p in expected.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(trained(model)(IDS), trained(expected)(IDS))
    assert model.base_model.model.up.base_layer.weight.is_meta  # given back after the call
    held, wanted = gradients(model), gradients(expected)
    assert held.keys() == wanted.keys() and all(torch.equal(held[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        y = expected(IDS)
        model.merge_adapter()
        torch.testing.assert_close(model(IDS), y)
        model.unmerge_adapter()
        assert torch.equal(model(IDS), y)
        torch.testing.assert_close(model.merge_and_unload()(IDS), y)


@offloads
@pytest.mark.parametrize("adapt", [adapted, convert], ids=["peft", "convert"])
def test_an_adapted_model_is_offloaded(offload, adapt, tmp_path):
    model = trained(adapt(Model())).eval()
    expected = model(IDS)
    offload(model, tmp_path)
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(IDS), expected)


@offloads
def test_convert_refuses_an_offloaded_model_and_leaves_it(offload, tmp_path):
    model = Model()
    expected = model(IDS)
    offload(model, tmp_path)
    with pytest.raises(ValueError, match="linear must hold its weight, .*: adapt the model before it is offloaded, or"):
        convert(model)
    assert torch.equal(model(IDS), expected)


def test_a_layer_that_only_moves_its_inputs_keeps_its_hook():
    """What accelerate puts on every layer of a model that is spread over devices."""
    model = Model()
    add_hook_to_module(model.up, AlignDevicesHook(execution_device="cpu"))
    through_peft, converted = adapted(copy.deepcopy(model)), convert(model)
    assert through_peft(IDS).shape == converted(IDS).shape
    assert converted.up._hf_hook.execution_device == "cpu" and "forward" in converted.up.__dict__


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


# ---- DeepSpeed ----


@pytest.mark.parametrize("way", ["convert", "peft"])
def test_gradients_under_zero_stage_3(way):
    """One process; the model is made in ``zero.Init``, so that no weight is whole outside of its layer's call."""
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install -e '.[integrations]'")
    port = 20000 + os.getpid() % 20000
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(ZERO), way],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


ZERO = """
    import sys

    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
    from torch import nn

    deepspeed.init_distributed("gloo")
    config = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 20), nn.Linear(20, 16, bias=False), nn.Linear(16, 4)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()).relu())

    def adapted(partitioned):
        torch.manual_seed(0)
        model = whole = Model()
        if partitioned:
            with deepspeed.zero.Init(config_dict_or_path=config):
                model = Model()
            assert model.a.weight.shape == (0,)
            for parameter, source in zip(model.parameters(), whole.parameters()):
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(source)
        torch.manual_seed(1)
        if sys.argv[1] == "convert":
            import bora_kernels

            return bora_kernels.convert(model, r=2, target_modules=["a", "b"])
        from peft import get_peft_model

        from bora_kernels.integrations.peft import BoraConfig

        return get_peft_model(model, BoraConfig(r=2, target_modules=["a", "b"]))

    def steps(partitioned):
        model = adapted(partitioned)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.2)
        x, results = torch.linspace(-1, 1, 24).view(2, 12), []
        run = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0] if partitioned else model
        for _ in range(2):
            loss = run(x).square().mean()
            if partitioned:
                run.backward(loss)
            else:
                loss.backward()
            grad = safe_get_full_grad if partitioned else (lambda p: p.grad)
            value = safe_get_full_fp32_param if partitioned else (lambda p: p)
            results.append({name: (value(p).detach().clone(), grad(p).clone()) for name, p in trained.items()})
            run.step() if partitioned else optimizer.step()
            optimizer.zero_grad()
        return results

    expected, actual = steps(False), steps(True)
    for before, after in zip(expected, actual):
        assert before.keys() == after.keys() and len(before) == 8
        for name, tensors in before.items():
            for a, b in zip(tensors, after[name]):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert all(expected[1][name][1].abs().max() > 0 for name in expected[1])
"""
