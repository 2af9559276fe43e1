"""Kinds of models whose layers are not all called, not all layers, or in several places: by ``convert`` and by PEFT."""

import copy
import warnings

import pytest
import torch
from helpers.people import adapt, adapters, loss_of, make, train, ways
from torch import nn

import bora_kernels
from bora_kernels.ops import watch

kinds_of_experts = pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(watch, "_said", set())


def warned(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(w.message) for w in caught if w.category is UserWarning]


@ways
@pytest.mark.parametrize("kind", ["t5", "falcon"])
def test_models_train_from_where_their_base_stands(kind, way):
    """T5 shares one embedding among three modules; Falcon's layers are a class of their own."""
    base = make(kind)
    start = loss_of(base).item()
    model = adapt(base, way)
    assert len(adapters(model)) == {"t5": 2 * 6 + 2 * 10, "falcon": 2 * 4}[kind]
    losses, said = warned(lambda: train(model))
    assert losses[0] == pytest.approx(start, rel=1e-5) and losses[-1] < losses[0] - 0.15
    assert all(kind == "falcon" and "was changed in place" in text for text in said)


@ways
@pytest.mark.parametrize("kind, left_out", [("mamba", ("x_proj", "dt_proj", "out_proj")), ("mamba2", ("out_proj",))])
def test_what_mambas_mixer_reads_without_a_call_is_left_out_or_refused(kind, left_out, way):
    model, said = warned(lambda: adapt(make(kind), way))
    assert {name.rpartition(".")[2] for name in adapters(model)} == {"in_proj"}
    assert len(said) == 1 and '"all-linear" leaves out backbone.layers.0.mixer.' in said[0] and "Mixer reads" in said[0]
    losses, said = warned(lambda: train(model))
    assert losses[-1] < losses[0] and not said
    for name in left_out:
        base = make(kind)
        with pytest.raises(ValueError, match=rf"layers.0.mixer.{name}.*Mixer reads its weight and may never call it"):
            adapt(base, way, ["in_proj", name])
        assert not adapters(base)


@ways
@kinds_of_experts
def test_experts_that_are_left_out_are_counted(kind, way):
    base = make(kind)
    experts = [p for name, p in base.named_parameters() if ".experts." in name]
    total, held = sum(p.numel() for p in base.parameters()), sum(p.numel() for p in experts)
    model, said = warned(lambda: adapt(base, way))
    expected = f"{len(experts)} tensors of 3 axes (gate_up_proj, down_proj) with {held:,} of the model's {total:,}"
    assert len(said) == 1 and said[0].startswith("Experts are not adapted: ") and expected in said[0]
    explanation = bora_kernels.explain(model)
    assert len(explanation.experts) == len(experts) and all("experts." in name for name in explanation.experts)
    *_, line = str(explanation).splitlines()
    assert line.startswith("experts without an adapter: ") and f"with {held:,} of the model's" in line
    losses, said = warned(lambda: train(model, 3))
    assert not said and losses[-1] < losses[0]


@ways
@kinds_of_experts
@pytest.mark.parametrize("targets", [["q_proj", "gate_up_proj"], ["mlp.experts.down_proj"]], ids=["both", "whole"])
def test_experts_are_no_targets(kind, targets, way):
    base = make(kind)
    with pytest.raises(
        ValueError, match=r"target_modules must name .*experts\..*_proj is a tensor of 3 axes, and exper"
    ):
        adapt(base, way, targets)
    assert not adapters(base)


@ways
def test_a_name_that_means_layers_and_experts_is_warned_of(way):
    """Qwen3-MoE has plain layers called down_proj in one block, and experts' tensors of that name in the other."""
    model, said = warned(lambda: adapt(make("qwen3_moe"), way, ["down_proj"]))
    assert list(adapters(model)) == ["model.layers.1.mlp.down_proj"]
    assert len(said) == 1 and said[0].startswith("Experts are not adapted: 2 tensors of 3 axes")


def test_names_of_experts_in_earlier_versions_of_transformers_are_warned_of():
    """PEFT lets pass what names nothing, as LoRA's names for Mixtral do: w1, w2 and w3 are no modules any more."""
    _, said = warned(lambda: adapt(make("mixtral"), "peft", ["q_proj", "w1", "w2", "w3"]))
    assert len(said) == 1 and said[0].startswith("Experts are not adapted: 4 tensors")


# ---- attention and encoders of PyTorch ----


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2)


@ways
def test_an_encoder_computes_with_its_adapters_in_evaluation_too(way):
    model, said = warned(lambda: adapt(encoder(), way))
    assert {name.rpartition(".")[2] for name in adapters(model)} == {"linear1", "linear2"}
    assert "self_attn.out_proj" in said[0] and "MultiheadAttention never calls it" in said[0]
    assert len(said) == 2 and "self_attn.in_proj_weight" in said[1]
    x, padding = torch.randn(3, 4, 8), torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 4])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = model(x, src_key_padding_mask=padding).detach()
    for _ in range(3):
        model(x, src_key_padding_mask=padding)[~padding].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(x, src_key_padding_mask=padding).detach()
    assert (trained - start)[~padding].abs().max() > 0.1
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], trained[~padding], rtol=1e-4, atol=1e-5)


@ways
def test_the_output_projection_of_attention_is_refused_by_name(way):
    base = encoder()
    with pytest.raises(ValueError, match="layers.0.self_attn.out_proj.*MultiheadAttention never calls it"):
        adapt(base, way, ["linear1", "out_proj"])
    assert not adapters(base)


# ---- one layer in several places ----


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.ModuleDict({"inner": nn.Linear(7, 7)})
        self.second, self.last = nn.ModuleDict({"again": self.first["inner"]}), nn.Linear(7, 7)

    def forward(self, x):
        return self.last(self.second["again"](torch.tanh(self.first["inner"](x))))


@ways
def test_a_layer_in_two_places_is_adapted_merged_and_saved_in_both(way, tmp_path):
    torch.manual_seed(0)
    base, x = Twice(), torch.randn(4, 7)
    start = copy.deepcopy(base)
    model = adapt(base, way, ["inner", "last"])
    assert base.first["inner"] is base.second["again"] and hasattr(base.second["again"], "adapter_dtype")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator) * parameter.requires_grad
    expected = model(x)
    assert not torch.allclose(expected, start(x), rtol=1e-2, atol=1e-2)
    if way == "convert":
        bora_kernels.save_adapter(model, tmp_path)
        loaded, plain = bora_kernels.load_adapter(copy.deepcopy(start), tmp_path), bora_kernels.merge_adapter
    else:
        from peft import PeftModel

        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        plain = lambda model: model.merge_and_unload()  # noqa: E731
    assert torch.equal(loaded(x), expected)
    merged = plain(model)
    assert type(merged.first["inner"]) is nn.Linear and merged.first["inner"] is merged.second["again"]
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)


# ---- what no rule knows ----


@ways
def test_a_head_whose_weight_a_fused_loss_reads_is_named(way):
    """As losses that never make the logits do."""
    model = adapt(make("mixtral"), way, ["q_proj", "lm_head"])
    inner = model if way == "convert" else model.get_base_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    hidden = inner.model(input_ids=torch.arange(10).view(2, 5)).last_hidden_state
    (hidden @ inner.lm_head.weight.T).logsumexp(-1).mean().backward()
    with pytest.warns(UserWarning, match="1 of 3 adapted layers took no part in this training step.*: lm_head"):
        optimizer.step()


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = (torch.arange(6) + index) % 30
        return {"input_ids": ids, "labels": ids}


@ways
def test_the_trainer_warns_of_layers_without_a_part_and_only_once(way, tmp_path):
    """Its optimizer is one that accelerate wraps."""
    import transformers

    class Fused(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            inner = model if way == "convert" else model.get_base_model()
            hidden = inner.model(input_ids=inputs["input_ids"]).last_hidden_state
            loss = torch.nn.functional.cross_entropy(
                (hidden @ inner.lm_head.weight.T).flatten(0, 1), inputs["labels"].flatten()
            )
            return (loss, hidden) if return_outputs else loss

    model = adapt(make("mixtral"), way, ["k_proj", "lm_head"])
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    _, said = warned(lambda: Fused(model=model, args=arguments, train_dataset=Tokens()).train())
    said = [text for text in said if "adapted layers" in text]
    assert len(said) == 1 and "1 of 3 adapted layers took no part" in said[0] and ": lm_head. " in said[0]


@ways
def test_a_magnitude_that_was_narrowed_is_warned_of(way):
    model = adapt(make("t5").bfloat16(), way)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    with pytest.warns(UserWarning, match="magnitudes of .* are torch.bfloat16: .*adapter_dtype") as caught:
        train(model, 2)
    assert len([w for w in caught if "magnitudes of" in str(w.message)]) == 1


def test_a_narrow_dtype_that_was_asked_of_peft_is_no_surprise():
    import peft

    from bora_kernels.integrations.peft import BoraConfig

    config = BoraConfig(r=2, target_modules="all-linear")
    model = peft.get_peft_model(make("t5").bfloat16(), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not [text for text in warned(lambda: train(model, 2))[1] if "magnitudes" in text]
