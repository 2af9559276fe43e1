"""What a fused decoder layer keeps for its backward, in bytes a token, against the same layer unfused."""

import copy

import pytest
import torch
from helpers.kept import kept_bytes, partitioned

pytestmark = pytest.mark.sampled(4)
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bora_kernels import convert, fuse  # noqa: E402

H, KV, I, HEADS, R, TOKENS = 256, 64, 704, 8, 8, 64
# What there is besides: factors u in float32, and scales, which do not depend on the tokens.
FLOORS = {"lora": 8 * H + 4 * KV + 4 * I, "dora": 14 * H + 6 * KV + 4 * I, "bora": 14 * H + 6 * KV + 4 * I}
ways = pytest.mark.parametrize("way", FLOORS)
FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "qwen": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {}),  # biases of q, k and v
    "gemma": (transformers.GemmaForCausalLM, transformers.GemmaConfig, {"head_dim": H // HEADS}),  # GELU, 1 + w
}


def make(way, family="llama"):
    torch.manual_seed(0)
    cls, config, options = FAMILIES[family]
    model = cls(
        config(
            hidden_size=H, intermediate_size=I, num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=2,
            vocab_size=64, attn_implementation="sdpa", **options,
        )
    ).to(torch.bfloat16)  # fmt: skip
    if way == "bora":
        return convert(model, r=R)
    options = {"r": R, "target_modules": "all-linear", "use_dora": way == "dora"}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def kept(model, through=lambda call: call):
    """Bytes a token that the layer's forward leaves, but for parameters."""
    base = model.base_model.model if hasattr(model, "peft_config") else model
    x = torch.randn(1, TOKENS, H, dtype=torch.bfloat16).requires_grad_()
    positions = base.model.rotary_emb(x, torch.arange(TOKENS)[None])

    forward = through(base.model.layers[0])
    known = (*model.parameters(), *positions)
    return kept_bytes(lambda: forward(x, position_embeddings=positions, attention_mask=None), known) / TOKENS


@ways
def test_a_fused_layer_keeps_what_cannot_be_made_anew(way):
    plain = make(way)
    before, after = kept(plain), kept(fuse(copy.deepcopy(plain)))
    assert after < {"lora": 0.33, "dora": 0.09, "bora": 0.62}[way] * before
    assert after < 1.1 * (FLOORS[way] + 4 * HEADS + 28 * R)


@ways
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_layer_keeps_no_more(way, family):
    """h and the norms' outputs are made anew there too, though the compiler parts forward and backward as it likes."""
    model = fuse(make(way, family))
    assert kept(model, partitioned) <= 1.01 * kept(model)
