"""PEFT's own DoRA and LoRA after ``fuse`` in one batch, by ``adapter_names`` in a call and in ``generate``."""

import pytest
import torch
from conftest import HAS_TRITON
from helpers.fused_models import peft_model
from helpers.peft_models import make_base, make_ids, train_a_little
from helpers.quantized_layers import quantized_linear
from torch import nn

peft = pytest.importorskip("peft")

import bora_kernels  # noqa: E402
from bora_kernels.quantized import read  # noqa: E402
from bora_kernels.serving import bank, batches  # noqa: E402

CONFIGS = {
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "lora": {"r": 5, "lora_alpha": 2},
    "other": {"r": 2, "lora_alpha": 7, "use_dora": True, "use_rslora": True, "lora_dropout": 0.3},
}
NAMES = ["lora", "dora", "__base__", "other", "dora"]


def several(base: nn.Module | None = None, targets="all-linear", **options) -> nn.Module:
    """A fused model of PEFT's own layers with these adapters, trained apart."""
    base = make_base(**options) if base is None else base
    configs = {name: peft.LoraConfig(target_modules=targets, **config) for name, config in CONFIGS.items()}
    model = peft.get_peft_model(base, configs["dora"], adapter_name="dora")
    for seed, (name, config) in enumerate(configs.items(), 20):
        if name != "dora":
            model.add_adapter(name, config)
        train_a_little(model, name, seed)
    return bora_kernels.fuse(model.requires_grad_(False).eval())


@torch.no_grad()
def by_peft_alone(model: nn.Module, name: str, *args, call=None, **kwargs):
    """What PEFT gives with this adapter alone, in its own forward."""
    bora_kernels.unfuse(model)
    try:
        call = call or model
        if name == "__base__":
            with model.disable_adapter():
                return call(*args, **kwargs)
        model.set_adapter(name)
        return call(*args, **kwargs)
    finally:
        bora_kernels.fuse(model)


def assert_each_is_its_own(model: nn.Module, names=NAMES, tolerance=1e-4) -> None:
    ids = make_ids(len(names)).to(model.device)
    logits = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = by_peft_alone(model, name, ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_every_input_has_its_own_adapter(kind, backend, device, monkeypatch):
    if backend == "triton":
        if not HAS_TRITON or kind != "llama":
            pytest.skip("one model is enough for the interpreter")
        plain = batches.AdapterBank
        monkeypatch.setattr(batches, "AdapterBank", lambda *args: plain(*args, backend="triton"))
    assert_each_is_its_own(several(make_base(kind)).to(device))


def test_peft_alone_refuses_it():
    """When it does not any more, this package may leave it to PEFT."""
    model = bora_kernels.unfuse(several())
    with pytest.raises(ValueError, match="DoRA"):
        model(make_ids(2), adapter_names=["dora", "lora"])


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_gives_each_its_own_text(beams):
    model = several(initializer_range=0.2)
    names = ["dora", "__base__", "lora", "other"]
    ids, mask = make_ids(4, 8), torch.ones(4, 8, dtype=torch.long)
    for row, padding in enumerate((2, 0, 3, 1)):
        mask[row, :padding] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    texts = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
    for row, name in enumerate(names):
        one = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        own = by_peft_alone(model, name, call=model.generate, **one, **options)
        assert torch.equal(texts[row], own[0])
    same = by_peft_alone(model, "dora", call=model.generate, input_ids=ids, attention_mask=mask, **options)
    assert all(not torch.equal(texts[row], same[row]) for row in (1, 2, 3)), "adapters that change no text show nothing"


def test_adapters_with_targets_of_their_own():
    model = bora_kernels.unfuse(several(targets=["q_proj", "down_proj"]))
    model.add_adapter("more", peft.LoraConfig(r=1, target_modules=["up_proj", "q_proj"], use_dora=True))
    train_a_little(model, "more", seed=9).requires_grad_(False)
    assert_each_is_its_own(bora_kernels.fuse(model), ["more", "lora", "dora", "__base__"])


def test_a_quantized_base_runs_adapter_by_adapter():
    """Judged by PEFT over what the quantized weights stand for."""
    base, dense = (make_base(hidden_size=64, intermediate_size=64) for _ in range(2))
    for layer, twin in zip(base.model.layers, dense.model.layers, strict=True):
        layer.mlp.down_proj = quantized_linear("nf4", layer.mlp.down_proj.weight.data, compute_dtype=torch.float32)
        twin.mlp.down_proj.weight.data = read(layer.mlp.down_proj).dense(torch.float32)
    base.is_loaded_in_4bit = True
    model, dense = several(base, ["down_proj"]), several(dense, ["down_proj"])
    dense.load_state_dict({name: p for name, p in model.state_dict().items() if "lora_" in name}, strict=False)
    assert any(type(module).__name__ == "Linear4bit" and hasattr(module, "lora_A") for module in model.modules())
    ids = make_ids(len(NAMES))
    logits = model(ids, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        tolerance = 3e-3 if name == "__base__" else 1e-4  # bitsandbytes multiplies in bfloat16 on some CPUs
        expected = by_peft_alone(dense, name, ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], expected, rtol=tolerance, atol=tolerance)


def test_scales_are_computed_once_for_a_call(monkeypatch):
    from bora_kernels.serving import entry

    computed = []
    plain = entry.norms_and_scales
    monkeypatch.setattr(entry, "norms_and_scales", lambda *args, **kw: computed.append(1) or plain(*args, **kw))
    model, ids = several(targets=["q_proj"]), make_ids(3)  # two layers
    names = ["dora", "__base__", "other"]
    model.generate(input_ids=ids, adapter_names=names, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    assert len(computed) == 4
    first = model(ids, adapter_names=names).logits
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    layer.lora_B["other"].weight.data[...] += 1.0  # a change that autograd's versions do not see, with the same list
    changed = model(ids, adapter_names=names).logits
    assert torch.equal(first[:2], changed[:2]) and not torch.allclose(first[2], changed[2])
    assert_each_is_its_own(model, names)


@pytest.mark.parametrize(
    "names, message",
    [(["dora", "nonsense"], "non-existing adapter"), (["dora"] * 3, "same as the number of inputs, but got 3 and 2")],
)
def test_names_that_peft_refuses(names, message):
    with pytest.raises(ValueError, match=message):
        several(targets=["q_proj"])(make_ids(2), adapter_names=names)


def test_training_disabled_and_merged_adapters_are_as_in_peft():
    model, ids, names = several(), make_ids(2), ["dora", "lora"]
    with pytest.raises(ValueError, match="training mode"):
        model.train()(ids, adapter_names=names)
    model.eval()
    with model.disable_adapter():
        assert torch.equal(model(ids, adapter_names=names).logits, model(ids).logits)
    model.merge_adapter(["dora"])
    with pytest.raises(ValueError, match="merged adapters"):
        model(ids, adapter_names=names)


def test_a_hook_in_a_layer_leaves_lora_to_peft_and_refuses_dora():
    model, ids = several(), make_ids(2)
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    layer.base_layer.register_forward_hook(lambda *_: None)
    expected = by_peft_alone(model, "lora", ids).logits
    torch.testing.assert_close(model(ids, adapter_names=["lora", "lora"]).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="adapter_names must be None, or of LoRA adapters alone, where .*a hook"):
        model(ids, adapter_names=["dora", "lora"])


def test_a_wanted_gradient_is_refused():
    model, ids = several(), make_ids(len(NAMES))
    next(p for n, p in model.named_parameters() if "lora_A.dora" in n).requires_grad_(True)
    with torch.no_grad():
        assert not model(ids, adapter_names=NAMES).logits.requires_grad
    with pytest.raises(ValueError, match="a gradient is wanted, of 'dora' or the input: call the model in"):
        model(ids, adapter_names=NAMES)


def test_gradients_of_lora_alone_stay_peft_s():
    model = bora_kernels.unfuse(several())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora." in name)
    ids, gradients = make_ids(2), []
    for prepare in (lambda m: m, bora_kernels.fuse):
        prepare(model)
        model.zero_grad()
        model(ids, adapter_names=["lora", "__base__"]).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_after_a_call(monkeypatch):
    import gc
    import weakref

    made = []
    plain = bank.AdapterBank.__init__
    monkeypatch.setattr(
        bank.AdapterBank, "__init__", lambda self, *a, **k: (made.append(weakref.ref(self)), plain(self, *a, **k))[1]
    )
    model = several()
    model(make_ids(2), adapter_names=["dora", "lora"])
    gc.collect()
    assert made and all(ref() is None for ref in made)


def test_layers_of_another_variant_are_named():
    model = peft_model("dora", "gpt2").requires_grad_(False).eval()
    model.base_model.model.transformer.h[0].attn.c_attn.lora_dropout["default"] = nn.AlphaDropout(0.5).eval()
    bora_kernels.fuse(model)
    with pytest.raises(ValueError, match="for 'default', its dropout is none of PyTorch's"):
        model(make_ids(2), adapter_names=["default", "__base__"])
