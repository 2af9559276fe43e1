"""Batches of several adapters in PEFT: ``adapter_names`` in a call of the model and of ``generate``."""

import pytest
import torch

pytest.importorskip("peft")
from conftest import HAS_TRITON
from helpers.peft_models import LAYERS, TOKENS, Layers, bora_layers, make_base, make_ids, make_peft, train_a_little
from peft import get_peft_model
from torch import nn

import bora_kernels
from bora_kernels.integrations.peft import BoraConfig, BoraLinear

MEMBERS = {
    "bora": {"r": 4, "lora_alpha": 8},
    "dora": {"r": 2, "lora_alpha": 8, "use_dora": True},
    "columns": {"r": 3, "lora_alpha": 2, "columns_only": True},
    "turned": {"r": 5, "lora_alpha": 3, "norm_order": "col_row", "use_rslora": True},
}


def with_members(base: nn.Module, targets="all-linear", changed: dict | None = None) -> nn.Module:
    """A model with an adapter of each member, trained apart, none of which is trainable any more."""
    configs = {
        name: BoraConfig(target_modules=targets, **options, **(changed or {}).get(name, {}))
        for name, options in MEMBERS.items()
    }
    model = get_peft_model(base, configs["bora"], adapter_name="bora")
    for seed, (name, config) in enumerate(configs.items(), 10):
        if name != "bora":
            model.add_adapter(name, config)
        train_a_little(model, name, seed)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def alone(model: nn.Module, name: str, *args, call=None, **kwargs):
    """What the model gives with this adapter alone."""
    call = call or model
    if name == "__base__":
        with model.disable_adapter():
            return call(*args, **kwargs)
    model.set_adapter(name)
    return call(*args, **kwargs)


NAMES = ["dora", "__base__", "bora", "columns", "bora", "turned"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_every_input_of_a_batch_runs_with_its_own_adapter(kind, backend, device):
    if backend == "triton" and (not HAS_TRITON or kind != "llama"):
        pytest.skip("one model is enough for the interpreter")
    if backend == "triton":  # and in it a layer of each shape
        model = with_members(make_base(kind, num_hidden_layers=1), ["q_proj", "v_proj", "down_proj"])
    else:
        model = with_members(make_base(kind))
    for layer in bora_layers(model).values():
        layer.backend = backend
    model, ids = model.to(device), make_ids(len(NAMES)).to(device)
    logits = model(ids, adapter_names=NAMES).logits
    assert not logits.requires_grad
    for row, name in enumerate(NAMES):
        expected = alone(model, name, ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
    model.set_adapter("bora")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, alone(model, "bora", ids).logits), "nothing is left of the batch"


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_each_its_own_text(beams):
    """Three members in one batch, and the base, with prompts of several lengths padded on the left."""
    model = with_members(make_base(initializer_range=0.2))
    names = ["bora", "dora", "__base__", "columns"]
    ids, mask = make_ids(4, 8), torch.ones(4, 8, dtype=torch.long)
    for row, padding in enumerate((0, 3, 1, 2)):
        mask[row, :padding] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    texts = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
    own = [
        alone(
            model,
            name,
            call=model.generate,
            input_ids=ids[row : row + 1],
            attention_mask=mask[row : row + 1],
            **options,
        )
        for row, name in enumerate(names)
    ]
    assert torch.equal(texts, torch.cat(own))
    same = alone(model, "bora", call=model.generate, input_ids=ids, attention_mask=mask, **options)
    assert all(not torch.equal(texts[row], same[row]) for row in (1, 2, 3)), "adapters that change no text show nothing"


def test_adapters_of_other_layers_leave_a_layer_as_its_base():
    """Each adapter has targets of its own, and a rank of its own for some layers."""
    changed = {"dora": {"rank_pattern": {"q_proj": 6}}, "bora": {"alpha_pattern": {"v_proj": 1}}}
    model = with_members(make_base(), ["q_proj", "v_proj"], changed)
    more = BoraConfig(r=2, target_modules=["down_proj", "q_proj"])
    model.add_adapter("more", more)
    train_a_little(model, "more", seed=5)
    model.requires_grad_(False)
    names, ids = ["more", "dora", "bora"], make_ids(3)
    logits = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(logits[row], alone(model, name, ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)


def test_layers_of_every_kind_and_scaled_adapters():
    model = with_members(Layers(), LAYERS)
    ids, names = torch.cat([TOKENS, TOKENS, TOKENS.flip(0)]), ["bora", "dora", "columns", "__base__", "turned", "bora"]
    for layer in bora_layers(model).values():
        layer.scale_layer(1.0)
        if isinstance(layer, BoraLinear):
            layer.set_scale("dora", 0.5)
    expected = torch.cat([alone(model, name, ids[row : row + 1]) for row, name in enumerate(names)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, adapter_names=names), expected, rtol=1e-4, atol=1e-4)


def test_hooks_on_a_base_layer_see_the_whole_batch_in_parts():
    model = with_members(make_base(), ["q_proj"])
    layer = next(iter(bora_layers(model).values()))
    seen = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    ids, names = make_ids(3), ["bora", "dora", "bora"]
    logits = model(ids, adapter_names=names).logits
    assert sum(seen) == 3
    for row, name in enumerate(names):
        torch.testing.assert_close(logits[row], alone(model, name, ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)


def test_what_changes_between_calls_is_seen():
    model = with_members(make_base(), ["q_proj"])
    ids, names = make_ids(2), ["bora", "dora"]
    before = model(ids, adapter_names=names).logits
    for parameter in model.parameters():
        parameter.data[...] *= 1.0  # no change
    layer = next(iter(bora_layers(model).values()))
    layer.lora_B["dora"].weight.data[...] += 1.0  # a change that autograd's versions do not see
    after = model(ids, adapter_names=names).logits
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after[1], alone(model, "dora", ids[1:]).logits[0], rtol=1e-4, atol=1e-4)


def test_scales_are_computed_once_for_a_call_and_once_in_a_scope(monkeypatch):
    from bora_kernels.serving import entry

    computed = []
    plain = entry.norms_and_scales
    monkeypatch.setattr(entry, "norms_and_scales", lambda *args, **kw: computed.append(1) or plain(*args, **kw))
    model = with_members(make_base(), ["q_proj"])  # two layers
    ids, names = make_ids(3), ["bora", "dora", "__base__"]
    model.generate(input_ids=ids, adapter_names=names, max_new_tokens=5, pad_token_id=0, eos_token_id=None)
    assert len(computed) == 4
    with bora_kernels.reuse_scales():
        for _ in range(3):
            first = model(ids, adapter_names=names).logits
        assert len(computed) == 8
        model(ids, adapter_names=["columns", *names[1:]])
        assert len(computed) == 10
        with torch.no_grad():
            for layer in bora_layers(model).values():
                layer.lora_A["bora"].weight.add_(0.5)
        changed = model(ids, adapter_names=names).logits
        assert len(computed) == 12
    assert not torch.allclose(first[0], changed[0]) and torch.equal(first[1:], changed[1:])
    torch.testing.assert_close(changed[0], alone(model, "bora", ids[:1]).logits[0], rtol=1e-4, atol=1e-4)


def test_a_deleted_and_a_reloaded_adapter(tmp_path):
    model = with_members(make_base(), ["q_proj"])
    ids, names = make_ids(2), ["bora", "dora"]
    expected = model(ids, adapter_names=names).logits
    model.save_pretrained(tmp_path, selected_adapters=["dora"])
    with bora_kernels.reuse_scales():
        model(ids, adapter_names=names)
        model.delete_adapter("dora")
        with pytest.raises(ValueError, match="non-existing adapter"):
            model(ids, adapter_names=names)
        model.load_adapter(tmp_path / "dora", "dora")
        torch.testing.assert_close(model(ids, adapter_names=names).logits, expected)


def test_adapters_come_and_go_in_a_scope_without_a_stale_result_in_bounded_memory(monkeypatch):
    """Loaded and deleted under new names and old ones, where memory that one leaves is the next one's."""
    from bora_kernels.serving import batches

    banks = []
    plain = batches.AdapterBank
    monkeypatch.setattr(batches, "AdapterBank", lambda *args: banks.append(plain(*args)) or banks[-1])
    model, ids = with_members(make_base(num_hidden_layers=1), ["q_proj"]), make_ids(3)
    with bora_kernels.reuse_scales():
        for swap in range(200):
            name = f"swapped{swap % 3}"
            if name in model.peft_config:
                model.delete_adapter(name)
            model.add_adapter(name, BoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
            train_a_little(model, name, seed=100 + swap)
            with torch.no_grad():
                logits = model(ids, adapter_names=["bora", name, "__base__"]).logits
            if swap % 10 == 0:
                expected = alone(model, name, ids[1:2]).logits[0]
                torch.testing.assert_close(logits[1], expected, rtol=1e-4, atol=1e-4)
            model.set_adapter("bora")
        (bank,) = banks
        assert len(bank) <= 4 and len(bank.slots.lora_A) <= 8, "no more than the adapters that the layer has"
        model.delete_adapter("swapped0")
        with torch.no_grad():
            model(ids, adapter_names=["bora", "dora", "__base__"])
        assert "swapped0" not in bank


def test_another_adapter_where_one_lay_is_not_taken_for_it():
    """Memory that is freed is soon the next adapter's, of the same size and never written in place either."""
    model, ids = with_members(make_base(), ["q_proj"]), make_ids(2)
    names, factor = ["bora", "dora"], next(iter(bora_layers(model).values())).lora_B["dora"]
    memory = factor.weight.numpy().copy()
    with bora_kernels.reuse_scales():
        for step in range(3):
            memory += step
            factor.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
            with torch.no_grad():
                logits = model(ids, adapter_names=names).logits
            torch.testing.assert_close(logits[1], alone(model, "dora", ids[1:]).logits[0], rtol=1e-4, atol=1e-4)


def test_nothing_is_left_of_a_batch_that_was_refused():
    """PEFT forgets its hooks where a call fails: the next one would run with the names of the first."""
    model = make_peft(make_base(), target_modules=["q_proj"]).eval()
    ids = make_ids(2)
    with torch.no_grad():
        expected = model(ids).logits
    for names in (["default", "__base__"], ["default"] * 3):
        with pytest.raises(ValueError, match="adapter_names must"):
            model(ids, adapter_names=names)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)


def test_what_a_batch_cannot_be():
    model = with_members(make_base(), ["q_proj"])
    ids, names = make_ids(2), ["bora", "dora"]
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(ids, adapter_names=["bora", "nonsense"])
    with pytest.raises(
        ValueError, match="adapter_names must have an entry for each of the 2 inputs of .*q_proj, got 3"
    ):
        model(ids, adapter_names=[*names, "bora"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(ids, adapter_names=names)
    model.eval()
    with pytest.raises(ValueError, match=r"must be None while adapters are merged, as \['bora'\] are in .*q_proj"):
        model.merge_adapter(["bora"])
        model(ids, adapter_names=names)
    model.unmerge_adapter()
    trained = make_peft(make_base(), target_modules=["q_proj"]).eval()
    with pytest.raises(ValueError, match="must be None where a gradient is wanted, as of lora_A.default.weight in"):
        trained(ids, adapter_names=["default", "__base__"])
    with torch.no_grad():
        trained(ids, adapter_names=["default", "__base__"])
    assert all(layer.mixed_batches is None for layer in bora_layers(trained).values())
    with model.disable_adapter():
        assert torch.equal(model(ids, adapter_names=names).logits, make_base()(ids).logits)
