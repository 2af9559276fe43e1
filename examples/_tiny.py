"""What the recipes run on where nothing is named: a random language model of two layers, a dozen words, short texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = "the a cat dog bird sees hears likes small big red who what . ? <s> </s> <unk>".split()
_TEMPLATE = "{% for m in messages %}{{ m.content }} </s> {% endfor %}"


def language_model(folder: Path) -> str:
    """Writes a model and its tokenizer into a folder, unless they are there, and returns its path."""
    import tokenizers
    import transformers

    if (folder / "config.json").is_file():
        return str(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=_TEMPLATE, **special)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), num_hidden_layers=2, initializer_range=0.1, bos_token_id=15, eos_token_id=16, **sizes
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def texts() -> list[str]:
    """Sentences of one pattern, 54 of them."""
    return [
        f"the {size} {one} {verb} the {other} ."
        for size in ("small", "big", "red")
        for one in ("cat", "dog", "bird")
        for verb in ("sees", "likes")
        for other in ("cat", "dog", "bird")
    ]


def pairs() -> list[dict[str, str]]:
    """Prompts, each with an answer that is wanted and one that is not."""
    rows = []
    for text in texts():
        _, size, one, verb, _, other, _ = text.split()
        rows.append(
            {"prompt": f"who {verb} the {other} ?", "chosen": f"the {size} {one} .", "rejected": f"a {other} ?"}
        )
    return rows


def read_texts(data: str | None) -> list[str]:
    """The lines of a file, or the texts above."""
    if data is None:
        return texts()
    found = [line.strip() for line in Path(data).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(found) < 2:
        raise SystemExit(f"--data must be a file with a text a line, two at least, got {len(found)} in {data}")
    return found


def train(model: nn.Module, tokenizer: Any, rows: list[str], *, steps: int, learning_rate: float) -> None:
    """Steps of AdamW on batches of eight texts, with a progress bar."""
    from tqdm import tqdm

    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0
    )
    for step in (bar := tqdm(range(steps), desc="training", unit="step")):
        batch = [rows[(8 * step + i) % len(rows)] for i in range(min(8, len(rows)))]
        loss = _loss(model, tokenizer, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def adapter(
    base: nn.Module, tokenizer: Any, rows: list[str], folder: Path, *, steps: int, learning_rate: float
) -> Path:
    """The folder, with an adapter over the base that was trained for a few steps."""
    from peft import get_peft_model

    from bora_kernels.integrations.peft import BoraConfig

    model = get_peft_model(base, BoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    train(model, tokenizer, rows, steps=steps, learning_rate=learning_rate)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Any, rows: list[str]) -> float:
    """The mean loss of a token."""
    losses, counts = [], []
    for start in range(0, len(rows), 8):
        batch = rows[start : start + 8]
        losses.append(_loss(model, tokenizer, batch).item())
        counts.append(sum(len(ids) for ids in tokenizer(batch)["input_ids"]))
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def _loss(model: nn.Module, tokenizer: Any, rows: list[str]) -> torch.Tensor:
    end = tokenizer.eos_token or ""
    inputs = tokenizer(
        [f"{row} {end}" for row in rows], return_tensors="pt", padding=True, truncation=True, max_length=512
    )
    inputs = inputs.to(next(model.parameters()).device)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss


def four_bits(model: str, dtype: torch.dtype) -> nn.Module:
    """A causal language model in 4-bit NormalFloat, as in QLoRA.

    In training mode from the start: in eval mode bitsandbytes repacks 4-bit weights on a CPU.
    """
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    place = {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(model, dtype=dtype, quantization_config=config, device_map=place).train()
