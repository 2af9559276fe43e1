"""Models of many families, adapted in every way, have the results that they have unfused."""

import copy
from collections import Counter

import pytest
import torch
from helpers.accuracy import assert_accurate

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bora_kernels import convert, explain, fuse  # noqa: E402
from bora_kernels.fusion import mlp, normed, shared  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "pad_token_id": 0,
}
T5 = {"d_model": 32, "d_ff": 40, "d_kv": 16, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
T5["decoder_start_token_id"] = 0
# family: its options, and how many of (gated MLPs, layers in groups, RMSNorms) there are
FAMILIES = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, (1, 5, 3)),
    "qwen2": ({}, (1, 5, 3)),
    "qwen3": ({"head_dim": 16}, (1, 5, 5)),
    "gemma2": ({"head_dim": 16}, (1, 5, 5)),
    "phi3": ({}, (1, 0, 3)),
    "glm4": ({"head_dim": 16}, (1, 3, 5)),
    "olmo2": ({}, (1, 5, 5)),
    "cohere": ({}, (1, 5, 0)),
    "lfm2": ({"layer_types": ["full_attention"], "block_auto_adjust_ff_dim": False}, (1, 5, 5)),
    "t5": (T5, (2, 10, 7)),
    "mixtral": ({"num_local_experts": 2, "experts_implementation": "eager"}, (0, 3, 3)),
    "falcon": ({}, (0, 0, 0)),
    "gpt2": ({"n_embd": 32, "n_layer": 1, "n_head": 2}, (0, 0, 0)),
    "bitnet": ({}, (0, 5, 5)),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = {
    "convert": lambda model: convert(model, r=3),
    "lora": lambda model: peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets(model))),
    "dora": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(r=3, target_modules=targets(model), use_dora=True)
    ),
    "bora": lambda model: peft.get_peft_model(model, BoraConfig(r=3, target_modules="all-linear")),
}


def targets(model):
    """Names of linear layers; "all-linear" would mean experts, too."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, kinds)} - {"lm_head"})


def make(family, way):
    options, _ = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **(SIZES | options))
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return train(WAYS[way](kind.from_config(config).eval().to(DEVICE)))


def train(model):
    """Every adapter off its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                change = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(parameter * (1 + 0.1 * change) if parameter.ndim == 1 else parameter + 0.1 * change)
    return model


def results(model):
    model.zero_grad()
    ids = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_same_results(fused, plain):
    exact = {name: t.double() for name, t in results(copy.deepcopy(plain).double()).items()}
    assert_accurate(results(fused), results(plain), exact, samples=16, floor=3e-6)


@pytest.fixture
def calls(monkeypatch):
    """How often each block ran."""
    made = Counter()

    def counting(place, name):
        inner = getattr(place, name)

        def call(*args):
            made[name] += 1
            made[f"{name} behind a norm"] += args[-1] is not None and name != "rms_norm"
            return inner(*args)

        monkeypatch.setattr(place, name, call)

    for place, name in ((mlp, "gated_mlp"), (shared, "shared_input"), (normed, "rms_norm")):
        counting(place, name)
    return made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_of_the_plain_model(family, way, calls):
    if (family, way) == ("gpt2", "convert"):
        pytest.skip("its layers are no nn.Linear")
    if family == "falcon" and way != "lora" and not hasattr(torch._C._autograd.SavedTensor, "unpack"):
        pytest.skip("it adds to a layer's output in place, which is refused under an older torch")
    plain = make(family, way)
    fused = fuse(copy.deepcopy(plain))
    kinds = Counter(part.kind for part in explain(fused).fused)
    expected = FAMILIES[family][1]
    assert (kinds["gated MLP"], kinds["layer that reads its input with others"], kinds["RMSNorm"]) == expected
    assert_same_results(fused, plain)
    mlps, grouped, norms = expected
    joint = family in ("phi3", "glm4")  # norms of columns are over gate and up together
    in_attention = grouped if joint else grouped - 2 * (mlps + (family == "bitnet"))
    assert calls["gated_mlp"] == (0 if joint and way in ("convert", "bora") else mlps) and calls["rms_norm"] == norms
    assert calls["shared_input"] == (in_attention // 2 if family == "t5" else in_attention // 3 + (family == "bitnet"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_blocks_behind_norms_keep_what_the_norm_reads(family, calls):
    fused = fuse(make(family, "convert"))
    results(fused)
    assert calls["gated_mlp behind a norm"] == calls["shared_input behind a norm"] == 1


@pytest.mark.parametrize(
    "family, way",
    [(family, way) for family in ("llama", "gemma2", "t5") for way in ("convert", "dora")] + [("phi3", "dora")],
)
def test_half_precision(family, way, calls):
    options, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SIZES | options))
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    plain = train(WAYS[way](kind.from_config(config).to(DEVICE, torch.bfloat16).eval()))
    assert_same_results(fuse(copy.deepcopy(plain)), plain)
    assert calls["gated_mlp"] and (calls["shared_input"] or family == "phi3") and calls["rms_norm"]


def test_some_layers_adapted_only(calls):
    """A group of those that are; an MLP with frozen members."""
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval().to(DEVICE)
    plain = train(convert(base, r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    assert_same_results(fuse(copy.deepcopy(plain)), plain)
    assert calls["gated_mlp"] == calls["shared_input"] == 1
    plain = train(
        convert(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval().to(DEVICE),
            r=2,
            target_modules=["o_proj"],
        )
    )
    fused = fuse(copy.deepcopy(plain))
    assert not [part for part in explain(fused).fused if part.kind != "RMSNorm"]
    assert_same_results(fused, plain)


def test_ranks_and_methods_mixed_in_a_block(calls):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval().to(DEVICE)
    convert(model, r=2, target_modules=["q_proj", "up_proj"])
    convert(model, r=5, target_modules=["k_proj", "down_proj"], method="dora", detach_norm=True)
    plain = train(convert(model, r=1, target_modules=["v_proj", "gate_proj"], norm_order="col_row"))
    assert_same_results(fuse(copy.deepcopy(plain)), plain)
    assert calls["gated_mlp"] == calls["shared_input"] == 1
