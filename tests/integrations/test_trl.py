"""TRL's trainers over a 4-bit base: they narrow what they train, all but what DoRA calls its magnitude."""

import copy
import warnings

import pytest
import torch
from helpers.people import VOCABULARY

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="needs TRL, of the extra integrations")
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from bora_kernels.integrations.peft import BoraConfig  # noqa: E402
from bora_kernels.ops import calls, watch  # noqa: E402

SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
WORDS = [*SPECIAL.values(), *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))]
MAGNITUDES = {"lora_magnitude_vector_row", "lora_magnitude_vector_col"}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A quantized model in training mode, because eval mode lets bitsandbytes repack 4-bit weights on a CPU."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=four_bit
    ).train()


DATA = {
    "sft": {"text": ["w1 w2 w3 w4 w5", "w3 w1 w4 w1 w5"] * 6},
    "dpo": {"prompt": ["w1 w2", "w3"] * 6, "chosen": ["w3 w4", "w5 w6"] * 6, "rejected": ["w9 w9", "w8"] * 6},
}
TRAINERS = {"sft": ("SFTTrainer", "SFTConfig"), "dpo": ("DPOTrainer", "DPOConfig")}


@pytest.mark.parametrize("kind", TRAINERS)
def test_both_magnitudes_train_in_float32_over_a_4_bit_base(kind, base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_said", set())
    monkeypatch.setattr(calls, "_prepared", {})
    trainer_class, arguments = (getattr(trl, name) for name in TRAINERS[kind])
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "logging_steps": 1, "seed": 1}
    options |= {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    trainer = trainer_class(
        model=copy.deepcopy(base),
        args=arguments(output_dir=str(tmp_path), **options),
        train_dataset=Dataset.from_dict(DATA[kind]),
        processing_class=tokenizer,
        peft_config=BoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    dtypes = {(name.split(".")[-3], p.dtype) for name, p in trained.items()}
    assert dtypes == {(name, torch.float32) for name in MAGNITUDES} | {
        (name, torch.bfloat16) for name in ("lora_A", "lora_B")
    }
    before = {name: p.detach().clone() for name, p in trained.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if "magnitudes" in str(w.message) or "adapted layers" in str(w.message)]
    moved = {name: (p != before[name]).float().mean().item() for name, p in trained.items() if "magnitude" in name}
    assert len(moved) == 2 * 7 and min(moved.values()) > 0.9, moved
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and sum(losses[-2:]) < sum(losses[:2]) - 0.02
