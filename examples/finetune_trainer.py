"""Fine-tune a causal language model with BoRA by the Trainer of transformers, sharded by Accelerate with FSDP2.

    accelerate launch --config_file examples/accelerate_fsdp2.yaml --num_processes 2 examples/finetune_trainer.py

The model and the data are those of finetune_distributed.py. Accelerate runs FSDP2 on GPUs only.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import TYPE_CHECKING

import torch
from finetune_distributed import add_arguments, build_model, export, read_tokens
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:  # the libraries are imported where they are used, so that --help needs none of them
    from transformers import Trainer


class Windows(Dataset):
    """Stretches of a text that follow each other."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.rows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(arguments: argparse.Namespace, folder: str) -> Trainer:
    from transformers import Trainer, TrainingArguments

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    per_rank, rest = divmod(arguments.batch, ranks * arguments.micro_batches)
    if rest:
        raise SystemExit(f"--batch {arguments.batch} must divide by {ranks} ranks times --micro-batches")
    model = build_model(arguments)
    model.config.use_cache = False
    options = TrainingArguments(
        output_dir=folder,
        max_steps=arguments.steps,
        learning_rate=arguments.lr,
        per_device_train_batch_size=per_rank,
        gradient_accumulation_steps=arguments.micro_batches,
        use_cpu=arguments.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, options, train_dataset=Windows(read_tokens(arguments), arguments.length))
    trainer.train()
    if arguments.export:
        export(trainer.model_wrapped, arguments.export)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    with tempfile.TemporaryDirectory() as folder:
        train(parser.parse_args(), folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
