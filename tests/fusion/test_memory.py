"""What a fused decoder layer keeps for its backward, in bytes a token, against the same layer unfused."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bora_kernels import convert, fuse  # noqa: E402

H, KV, I, HEADS, R, TOKENS = 256, 64, 704, 8, 8, 64
# What there is besides: factors u in float32, and scales, which do not depend on the tokens.
FLOORS = {"lora": 8 * H + 4 * KV + 4 * I, "dora": 14 * H + 6 * KV + 4 * I, "bora": 14 * H + 6 * KV + 4 * I}


def make(way):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=H, intermediate_size=I, num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=2,
        vocab_size=64, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    if way == "bora":
        return convert(model, r=R)
    options = {"r": R, "target_modules": "all-linear", "use_dora": way == "dora"}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def kept(model):
    """Bytes a token that the layer's forward leaves, but for parameters."""
    base = model.base_model.model if hasattr(model, "peft_config") else model
    x = torch.randn(1, TOKENS, H, dtype=torch.bfloat16).requires_grad_()
    positions = base.model.rotary_emb(x, torch.arange(TOKENS)[None])
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *positions)}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes(), tensor  # kept alive, so that no place is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base.model.layers[0](x, position_embeddings=positions, attention_mask=None)
    return sum(size for size, _ in storages.values()) / TOKENS


@pytest.mark.parametrize("way", FLOORS)
def test_a_fused_layer_keeps_what_cannot_be_made_anew(way):
    plain = make(way)
    before, after = kept(plain), kept(fuse(copy.deepcopy(plain)))
    assert after < {"lora": 0.33, "dora": 0.09, "bora": 0.62}[way] * before
    assert after < 1.1 * (FLOORS[way] + 4 * HEADS + 28 * R)
