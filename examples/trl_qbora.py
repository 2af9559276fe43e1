"""Fine-tune with TRL over a 4-bit base (QBoRA): supervised (SFT) or on preferences (DPO).

    python examples/trl_qbora.py --task sft                  # a tiny random model and made-up texts, seconds on a CPU
    python examples/trl_qbora.py --task dpo --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl

Data is a .jsonl or .csv file or a data set of the hub, with TRL's columns: ``text``, ``messages``, or ``prompt`` and
``completion`` for SFT; ``prompt``, ``chosen`` and ``rejected`` for DPO. --output holds the adapter in the end.

What is BoRA's in it is the configuration that ``peft_config`` takes. TRL narrows what it trains to bfloat16 over a
quantized base; the magnitudes, whose small steps bfloat16 would lose, stay float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("trl", "datasets", "peft", "transformers", "bitsandbytes")
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def main(arguments: list[str] | None = None) -> int:
    """Train and save the adapter; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if missing := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        parser.exit(1, f'this example needs {", ".join(missing)}: pip install ".[examples,integrations,quantized]"\n')
    import _tiny
    from peft import PeftModel
    from transformers import AutoTokenizer

    from bora_kernels.integrations.peft import BoraConfig

    name = options.model or _tiny.language_model(options.output / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = BoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(options, _tiny.four_bits(name, torch.bfloat16), tokenizer, config)
    trainer.train()
    adapter = options.output / "adapter"
    trainer.save_model(str(adapter))

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        f"\n{options.task}: loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last; adapter in {adapter}"
    )
    PeftModel.from_pretrained(_tiny.four_bits(name, torch.bfloat16), adapter)  # as a later process does
    return 0


def make_trainer(options: argparse.Namespace, model: Any, tokenizer: Any, config: Any) -> Any:
    """TRL's trainer for the task."""
    import trl

    trainer, settings = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
    }[options.task]
    cuda = torch.cuda.is_available()
    return trainer(
        model=model,
        args=settings(
            output_dir=str(options.output / "checkpoints"),
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.learning_rate,
            max_length=options.max_length,
            weight_decay=0.0,  # it would shrink the magnitudes, and with them W'
            bf16=cuda,
            use_cpu=not cuda,
            gradient_checkpointing=cuda,
            logging_steps=1 if options.max_steps <= 50 else 10,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=load_data(options),
        processing_class=tokenizer,
        peft_config=config,
    )


def load_data(options: argparse.Namespace) -> Any:
    """The rows to train on."""
    import _tiny
    import datasets

    if options.data is None:
        rows = [{"text": f"{text} </s>"} for text in _tiny.texts()] if options.task == "sft" else _tiny.pairs()
        return datasets.Dataset.from_list(rows)
    path = Path(options.data)
    if path.is_file():
        if path.suffix not in _READERS:
            raise SystemExit(f"--data must end in {', '.join(_READERS)}, got {path}")
        return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    return datasets.load_dataset(options.data, split="train")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    standard = "(default: %(default)s)"
    add("--task", choices=("sft", "dpo"), default="sft", help=standard)
    add("--model", help="causal language model: hub id or folder (default: a tiny random one)")
    add("--data", help="rows with TRL's columns: file or hub id (default: made-up ones)")
    add("--rank", type=int, default=16, help=standard)
    add("--alpha", type=float, default=32, help=f"updates are scaled by alpha / rank {standard}")
    add("--learning-rate", type=float, default=2e-3, help=f"1e-4 to 3e-4 for a real model {standard}")
    add("--max-steps", type=int, default=20, help=standard)
    add("--batch-size", type=int, default=4, help=standard)
    add("--accumulate", type=int, default=1, help=f"batches that make one optimizer step {standard}")
    add("--max-length", type=int, default=1024, help=f"texts are cut to this many tokens {standard}")
    add("--seed", type=int, default=0, help=standard)
    add("--output", type=Path, default=Path("trl_output"), help=standard)
    return parser


if __name__ == "__main__":
    sys.exit(main())
