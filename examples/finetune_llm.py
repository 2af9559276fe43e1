"""Fine-tune any causal language model of transformers with LoRA, DoRA, BoRA or BoRA over a 4-bit base.

    pip install ".[examples]"   # in a checkout
    python examples/finetune_llm.py --model HuggingFaceTB/SmolLM2-135M --data my_texts.jsonl --method bora

Data is a data set of the hub, a folder that ``datasets`` reads, or a .jsonl, .csv, .parquet or .txt file. A row has
``text``, or ``prompt`` and ``completion`` (the loss is then the completion's), or ``messages`` of a chat.

Run it again with the same --output and it goes on from the last checkpoint. In the end --output holds ``adapter`` (for
``PeftModel.from_pretrained`` or ``bora_kernels.load_adapter``), ``merged`` (a plain model; after --method qbora
of the weights that the 4-bit ones stand for) and ``results.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import bora_kernels

if TYPE_CHECKING:  # the libraries are imported where they are used, so that --help needs none of them
    import datasets
    from peft import LoraConfig
    from transformers import Trainer

_LIBRARIES = ("datasets", "peft", "transformers", "accelerate")
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_IGNORED = -100  # the label of a token that has no part in the loss


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate, merge; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f'this example needs {", ".join(missing)}: pip install ".[examples]"\n')
    check_data(parser, options.data)

    import transformers
    from peft import PeftModel, get_peft_model
    from transformers import AutoTokenizer
    from transformers.trainer_utils import get_last_checkpoint

    transformers.set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    train, validation = load_data(options, tokenizer)
    model = load_base(options.model, options.dtype, quantized=options.method == "qbora")
    model = get_peft_model(model, adapter_config(options))
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.print_trainable_parameters()
    if options.method != "lora":
        print(bora_kernels.explain(model))

    trainer = make_trainer(options, model, tokenizer, train, validation)
    losses = {"base": evaluate(trainer)}  # every method starts as the pretrained model
    checkpoint = get_last_checkpoint(trainer.args.output_dir) if Path(trainer.args.output_dir).is_dir() else None
    print(f"going on from {checkpoint}" if checkpoint else f"training on {len(train)} examples")
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    losses[options.method] = evaluate(trainer)
    adapter = options.output / "adapter"
    model.save_pretrained(adapter)
    steps = trainer.state.global_step - (int(checkpoint.rpartition("-")[2]) if checkpoint else 0)

    if options.merged_dtype != "none":
        del model, trainer  # their memory is needed
        merged = PeftModel.from_pretrained(load_to_merge(options), adapter).merge_and_unload()
        losses["merged"] = evaluate(make_trainer(options, merged, tokenizer, train, validation))
        merged.save_pretrained(options.output / "merged")
        tokenizer.save_pretrained(options.output / "merged")
    report(options, losses, outcome.metrics["train_runtime"] / max(1, steps), adapter)
    return 0


# --- data ------------------------------------------------------------------------------------------------------------


def check_data(parser: argparse.ArgumentParser, data: str) -> None:
    """End with a usage error for a file that no reader takes, or a path to nothing, before anything is loaded."""
    path = Path(data)
    if path.is_file() and path.suffix not in _READERS:
        parser.error(f"--data must end in {', '.join(_READERS)}, got {data}")
    looks_like_a_path = path.suffix in _READERS or data.count("/") > 1 or data.startswith((".", "/", "~"))
    if not path.exists() and looks_like_a_path:
        parser.error(f"--data must be a file, a folder or a data set of the hub, got {data}, which is no file")


def load_data(options: argparse.Namespace, tokenizer) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Token ids and labels to train on and to evaluate on; the latter are split off where the data has none."""
    import datasets

    path = Path(options.data)
    if path.is_file():
        data = datasets.load_dataset(_READERS[path.suffix], data_files=str(path))
    else:
        data = datasets.load_dataset(options.data, options.subset)
    held_out = next((data[name] for name in ("validation", "test") if name in data), None)
    if held_out is None:
        parts = data["train"].train_test_split(options.validation_share, seed=options.seed)
        data, held_out = {"train": parts["train"]}, parts["test"]

    def encode(row: dict) -> dict:
        return encode_row(row, tokenizer, options.max_length)

    encoded = [
        part.map(encode, remove_columns=part.column_names).filter(lambda row: len(row["input_ids"]) > 1)
        for part in (data["train"], held_out)
    ]
    if not all(map(len, encoded)):
        raise ValueError(f"--data must hold texts of two tokens and more for both parts, got {list(map(len, encoded))}")
    return encoded[0], encoded[1].select(range(min(len(encoded[1]), options.max_validation)))


def encode_row(row: dict, tokenizer, max_length: int) -> dict[str, list[int]]:
    """Token ids of a row, ending with the end-of-text token, and its labels."""
    end = tokenizer.eos_token or ""
    if row.get("messages") is not None:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt, ids = [], tokenizer(text, add_special_tokens=False)["input_ids"]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"] + end, add_special_tokens=False)["input_ids"]
    elif row.get("text") is not None:
        prompt, ids = [], tokenizer(row["text"] + end)["input_ids"]
    else:
        raise ValueError(f"--data must have text, prompt and completion, or messages, got {', '.join(row)}")
    labels = [_IGNORED] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


# --- models ----------------------------------------------------------------------------------------------------------


def load_base(name: str, dtype_name: str, quantized: bool) -> torch.nn.Module:
    """The pretrained model; quantized it is in 4-bit NormalFloat with double quantization, as in QLoRA."""
    import transformers
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, dtype_name)
    if not quantized:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, quantization_config=four_bit, device_map={"": device}
    )


def load_to_merge(options: argparse.Namespace) -> torch.nn.Module:
    """The base that the adapter was trained over, in the dtype of the merged model; qbora's keeps its 4-bit weights."""
    if options.method != "qbora":
        return load_base(options.model, options.merged_dtype, quantized=False)
    base = load_base(options.model, options.dtype, quantized=True)
    for parameter in base.parameters():
        if parameter.is_floating_point():  # all but the packed weights
            parameter.data = parameter.data.to(getattr(torch, options.merged_dtype))
    return base


def adapter_config(options: argparse.Namespace) -> LoraConfig:
    """PEFT's configuration: only the class and two options tell BoRA, DoRA and LoRA apart."""
    from peft import LoraConfig

    from bora_kernels.integrations.peft import BoraConfig

    targets = options.target_modules
    shared = {
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": targets if targets == "all-linear" else targets.split(","),
        "task_type": "CAUSAL_LM",
    }
    if options.method == "lora":
        return LoraConfig(**shared)
    return BoraConfig(norm_order=options.norm_order, use_dora=options.method == "dora", **shared)


# --- training --------------------------------------------------------------------------------------------------------


def make_trainer(options: argparse.Namespace, model: torch.nn.Module, tokenizer, train, validation) -> Trainer:
    """Transformers' trainer: AdamW, a warm-up over the first steps and a cosine down to 0."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    steps = math.ceil(len(train) / (options.batch_size * options.accumulate)) * options.epochs
    steps = options.max_steps or math.ceil(steps)
    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        max_steps=steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.03 * steps),
        weight_decay=0.0,
        bf16=options.dtype == "bfloat16",
        logging_steps=max(1, steps // 50),
        save_steps=options.save_steps,
        save_total_limit=2,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_IGNORED, pad_to_multiple_of=8)
    return Trainer(model, arguments, data_collator=collator, train_dataset=train, eval_dataset=validation)


def evaluate(trainer: Trainer) -> float:
    return trainer.evaluate()["eval_loss"]


def report(options: argparse.Namespace, losses: dict[str, float], seconds_per_step: float, adapter: Path) -> None:
    """Print the table and write it to results.json."""
    print(f"\n{'model':<8}  {'validation loss':>15}  {'perplexity':>10}")
    for name, loss in losses.items():
        print(f"{name:<8}  {loss:>15.4f}  {math.exp(loss):>10.2f}")
    size = sum(path.stat().st_size for path in adapter.iterdir()) / 2**20
    line = f"\n{seconds_per_step:.2f} s a step, the adapter takes {size:.1f} MiB"
    results = {"losses": losses, "seconds_per_step": seconds_per_step, "adapter_mib": size}
    if torch.cuda.is_available():
        results["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        line += f", peak memory {results['peak_gib']:.2f} GiB on {torch.cuda.get_device_name()}"
    print(f"{line}; all is in {options.output}")
    results["options"] = vars(options)
    (options.output / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    standard = "(default: %(default)s)"
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    add("--model", required=True, help="causal language model: hub id or folder")
    add("--data", required=True, help="texts: hub id, folder or file")
    add("--subset", help="configuration of a data set that has several")
    add("--method", choices=("lora", "dora", "bora", "qbora"), default="bora", help=standard)
    add("--rank", type=int, default=16, help=standard)
    add("--alpha", type=float, default=32, help=f"updates are scaled by alpha / rank {standard}")
    add("--dropout", type=float, default=0.0, help=f"on the input of the low-rank branch {standard}")
    add("--norm-order", choices=("row_col", "col_row"), default="row_col", help=f"of BoRA {standard}")
    add("--target-modules", default="all-linear", help=f"all-linear or names with commas between {standard}")
    add("--learning-rate", type=float, default=2e-4, help=standard)
    add("--epochs", type=float, default=1, help=standard)
    add("--max-steps", type=int, help="instead of epochs")
    add("--batch-size", type=int, default=8, help=f"examples a step and device {standard}")
    add("--accumulate", type=int, default=1, help=f"batches that make one optimizer step {standard}")
    add("--max-length", type=int, default=1024, help=f"texts are cut to this many tokens {standard}")
    add("--gradient-checkpointing", action="store_true", help="less memory for a second forward pass")
    add("--dtype", choices=("bfloat16", "float32"), default=dtype, help=f"of the frozen weights {standard}")
    add("--save-steps", type=int, default=200, help=f"steps between checkpoints {standard}")
    add("--validation-share", type=float, default=0.05, help=f"where the data has no validation part {standard}")
    add("--max-validation", type=int, default=500, help=f"examples to evaluate on {standard}")
    add("--seed", type=int, default=0, help=standard)
    merged = "of the merged model; bfloat16 takes half the space and rounds, by less than a unit and without bias"
    add("--merged-dtype", choices=("float32", "bfloat16", "none"), default="float32", help=f"{merged} {standard}")
    add("--output", type=Path, default=Path("finetune_output"), help=standard)
    return parser


if __name__ == "__main__":
    sys.exit(main())
