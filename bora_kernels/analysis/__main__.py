"""``python -m bora_kernels.analysis ADAPTER --base MODEL``: table and figure of a saved adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import nn

from . import from_start, plot, table


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m bora_kernels.analysis``, see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m bora_kernels.analysis",
        description="How far an adapter moved the magnitudes (dM) and the directions (dD) of each layer's weight from "
        "W0, by output feature (row) and by input feature (col): a table and a figure. Needs PEFT and transformers.",
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="a folder that save_adapter or PEFT wrote (BoRA, DoRA, LoRA)"
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help="the base model: a folder or a name on the hub")
    parser.add_argument("--model-class", metavar="CLASS", help="transformers' class; default: what MODEL's config says")
    parser.add_argument("--figure", default="weight_change.png", help="PNG to write (default %(default)s); '' for none")
    options = parser.parse_args(arguments)
    changes = from_start(_load(options.adapter, options.base, options.model_class))
    print(table(changes))
    if options.figure:
        plot(changes, options.figure)
        print(f"\nfigure: {options.figure}")


def _load(adapter: str, base: str, model_class: str | None) -> nn.Module:
    import transformers
    from peft import PeftModel

    from ..integrations import peft  # noqa: F401  # makes PEFT know BoRA

    name = model_class or (transformers.AutoConfig.from_pretrained(base).architectures or ["AutoModel"])[0]
    if not hasattr(transformers, name):
        raise ValueError(f"model_class must be a class of transformers, got {name!r}")
    return PeftModel.from_pretrained(getattr(transformers, name).from_pretrained(base), adapter)


if __name__ == "__main__":
    main()
