"""Models whose weights are elsewhere between calls: offloading by accelerate, ZeRO stage 3 of DeepSpeed."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # noqa: E402
from helpers.four_kinds import IDS, Model, adapted, trained  # noqa: E402
from helpers.people import adapt, loss_of, make, train  # noqa: E402

from bora_kernels import convert  # noqa: E402

CPU = torch.device("cpu")
OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=CPU),
}
offloads = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)


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


# ---- device_map of transformers, with "disk" ----

DISK = {
    "weights": {"model": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"},
    "part": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "lm_head": "disk",
    },
}
device_maps = pytest.mark.parametrize("device_map", DISK.values(), ids=DISK)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def load(saved, tmp_path):
    def load(device_map=None):
        options = {} if device_map is None else {"offload_folder": tmp_path / "offload"}
        return transformers.AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, **options)

    return load


@device_maps
def test_a_model_that_was_loaded_onto_disk_trains_and_merges(device_map, load):
    def adapted(model):
        torch.manual_seed(1)
        return trained(adapt(model, "peft"))

    model, expected = adapted(load(device_map)), adapted(load())
    assert model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.is_meta
    assert train(model, steps=3) == train(expected, steps=3)
    with torch.no_grad():
        loss = loss_of(expected)
        torch.testing.assert_close(loss_of(model.merge_and_unload()), loss)


def test_an_adapter_is_loaded_into_a_model_on_disk(load, tmp_path, monkeypatch):
    """As for LoRA, PEFT has to be told where the base is."""
    monkeypatch.chdir(tmp_path)  # where PEFT writes as well
    expected = trained(adapt(load(), "peft"))
    expected.save_pretrained(tmp_path / "adapter")
    device_map = {f"base_model.model.{name}": device for name, device in DISK["weights"].items()}
    where = {"device_map": device_map, "offload_dir": tmp_path / "adapters"}
    model = peft.PeftModel.from_pretrained(load(DISK["weights"]), tmp_path / "adapter", **where)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(loss_of(model), loss_of(expected))


@device_maps
def test_convert_refuses_a_model_on_disk_and_leaves_it(device_map, load):
    model = load(device_map)
    with pytest.raises(ValueError, match="linear must hold its weight, .* adapt it through PEFT"):
        convert(model)
    assert torch.equal(loss_of(model), loss_of(load()))


# ---- DeepSpeed ----


@pytest.mark.slow  # DeepSpeed compiles an extension first
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
