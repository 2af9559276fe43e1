"""``fuse`` and ``unfuse`` themselves: what is refused, what is left out, copies, files, other libraries' hooks."""

import copy
import io
import types

import pytest
import torch
from helpers.fused_models import assert_same_results, peft_model, results, twins
from helpers.peft_models import make_base, make_ids, make_peft
from torch import nn

from bora_kernels import convert, explain, fuse, unfuse

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")


def state_of(model):
    return {name: (id(module), dict(module.__dict__)) for name, module in model.named_modules()}


def assert_refused(model, error, match):
    before = state_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=match):
        fuse(model)
    assert before is None or state_of(model) == before


def test_refusals():
    assert_refused("a name", TypeError, "model must be a torch.nn.Module, got str")
    assert_refused(make_base(), ValueError, "model must have adapters, got one without")
    assert_refused(fuse(peft_model()), ValueError, "model must not be fused, got one that is")
    assert_refused(torch.compile(peft_model()), ValueError, "model must not be compiled, got one that is as a whole")
    regional = peft_model()
    regional.base_model.model.model.layers[1].compile()
    assert_refused(regional, ValueError, "compiled, got one that is in base_model.model.model.layers.1: fuse it first")


@pytest.mark.parametrize("way", ["lora", "dora", "bora", "convert"])
def test_merged_layers_are_refused(way):
    if way == "convert":
        model = convert(make_base(), r=2)
        model.model.layers[1].self_attn.k_proj.merge()
    else:
        model = make_peft(make_base()) if way == "bora" else peft_model(way)
        model.base_model.model.model.layers[1].self_attn.k_proj.merge()
    assert_refused(model, ValueError, r"model must not be merged, got one that is in .*layers.1.self_attn.k_proj")


def test_unfuse_refuses_what_is_not_fused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        unfuse(3)
    with pytest.raises(ValueError, match="model must be fused, got one that is not"):
        unfuse(peft_model())


def test_after_unfuse_a_model_can_be_fused_again():
    model = fuse(unfuse(fuse(peft_model())))
    assert len(explain(model).fused) > 0


def stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, stored], ids=["deepcopy", "torch.save"])
def test_a_copy_is_fused_and_has_its_own_weights(make):
    fused, plain = twins(peft_model())
    twin = make(fused)
    assert [p.name for p in explain(twin).fused] == [p.name for p in explain(fused).fused]
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert_same_results(twin, plain)
    unfuse(twin)
    assert_same_results(twin, plain)


def test_replicas_of_data_parallel_have_their_own_weights():
    layer = fuse(peft_model(target_modules=["q_proj", "o_proj"])).base_model.model.model.layers[0].self_attn.o_proj
    x = torch.randn(5, 32)
    replica = layer._replicate_for_data_parallel()
    base = copy.deepcopy(layer.base_layer)
    base.weight.mul_(2)
    replica._modules = {**replica._modules, "base_layer": base}
    torch.testing.assert_close(replica(x) - layer(x), layer.base_layer(x))
    assert explain(layer).fused and not explain(replica).fused


def add_hooks(model):
    for module in model.modules():
        hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
        accelerate.hooks.add_hook_to_module(module, hook)


def test_accelerate_s_hooks_before_fuse_stay_and_can_be_removed():
    model = peft_model()
    add_hooks(model)
    fused, plain = twins(model)
    assert_same_results(fused, plain)
    parts = [part for part in explain(fused).fused]
    assert parts and not [part for part in parts if part.problem]
    for m in (fused, plain):
        accelerate.hooks.remove_hook_from_module(m, recurse=True)
    assert [part.name for part in explain(fused).fused] == [part.name for part in parts]
    assert_same_results(fused, plain)
    unfuse(fused)
    assert not explain(fused).fused
    assert_same_results(fused, plain)


def test_accelerate_s_hooks_after_fuse():
    fused, plain = twins(peft_model())
    add_hooks(fused)
    assert_same_results(fused, plain)
    assert not [part for part in explain(fused).fused if part.problem]
    unfuse(fused)
    assert not explain(fused).fused
    assert_same_results(fused, plain)


def test_offloaded_layers_are_left_to_accelerate():
    fused, plain = twins(peft_model())
    accelerate.cpu_offload(fused, execution_device=torch.device("cpu"))
    assert {part.problem for part in explain(fused).fused} != {None}
    with torch.no_grad():
        torch.testing.assert_close(fused(make_ids()).logits, plain(make_ids()).logits)


def test_a_forward_that_someone_else_patched_is_left_out():
    model = peft_model(target_modules=["q_proj", "v_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.forward = types.MethodType(lambda self, x: 3 * type(self).forward(self, x), layer)
    fused, plain = twins(model)
    name = "base_model.model.model.layers.0.self_attn.v_proj"
    assert explain(fused).not_fused == ((name, "someone else has put another forward into it"),)
    assert_same_results(fused, plain)
    assert "forward" in unfuse(fused).get_submodule(name).__dict__


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_checkpointing(reentrant, variant):
    fused, plain = twins(peft_model(variant))
    for model in (fused, plain):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_same_results(fused, plain)


def test_generate():
    fused, plain = twins(peft_model("dora"))
    expected, found = (
        m.generate(input_ids=make_ids(), max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (plain, fused)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", ["dora", "bora"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-6)], ids=["fp32", "fp64"])
def test_training_has_the_same_losses(dtype, tolerance, way, device):
    base = make_base(num_hidden_layers=1)
    model = make_peft(base) if way == "bora" else peft_model(way, base=base)
    fused, plain = twins(model.to(device, dtype))
    losses = []
    for model in (fused, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for step in range(40):
            ids = make_ids(seed=step % 2).to(device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1][-1] < losses[1][0] - 0.3
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=tolerance, atol=0)


def test_the_model_works_inside_ddp_like_wrappers():
    fused, plain = twins(peft_model())

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    expected, found = results(Wrapper(plain)), results(Wrapper(fused))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
