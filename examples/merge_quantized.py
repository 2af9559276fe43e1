"""Merge an adapter that was trained over a 4-bit base: into what the 4-bit weights stand for, or into the dense model.

    python examples/merge_quantized.py                       # a tiny random model, an adapter made on the way
    python examples/merge_quantized.py --model M --adapter trl_output/adapter --data texts.txt

The adapter learned beside the rounding of the 4-bit weights. Merged into what these stand for, the model is the one
that was trained. Merged into the dense model that they were made from, it lacks that rounding and the adapter has not
seen it: better or worse is for the loss on your texts to say, which is printed for all of them. Both are written.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

_LIBRARIES = ("peft", "transformers", "bitsandbytes")


def main(arguments: list[str] | None = None) -> int:
    """Merge both ways and compare; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if missing := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        parser.exit(1, f'this example needs {", ".join(missing)}: pip install ".[examples,quantized]"\n')
    import _tiny
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import bora_kernels.integrations.peft  # noqa: F401  (makes PEFT know the method)

    dtype = getattr(torch, options.dtype)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    name = options.model or _tiny.language_model(options.output / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = _tiny.read_texts(options.data)

    def dense() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)

    steps = {"steps": options.steps, "learning_rate": options.learning_rate}
    adapter = options.adapter or _tiny.adapter(
        _tiny.four_bits(name, dtype), tokenizer, rows, options.output / "adapter", **steps
    )
    losses = {"the dense model": _tiny.evaluate(dense(), tokenizer, rows)}
    base = _tiny.four_bits(name, dtype)
    losses["its 4-bit weights"] = _tiny.evaluate(base, tokenizer, rows)
    model = PeftModel.from_pretrained(base, adapter).train()
    losses["with the adapter, as trained"] = _tiny.evaluate(model, tokenizer, rows)
    for kind, merged in (
        ("4-bit", model.merge_and_unload()),
        ("dense", PeftModel.from_pretrained(dense(), adapter).merge_and_unload()),
    ):
        folder = options.output / f"merged_{kind.replace('-', '_')}"
        losses[f"merged into the {kind} one's values"] = _tiny.evaluate(merged, tokenizer, rows)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    width = max(map(len, losses))
    print(f"\n{'':{width}}  loss on {len(rows)} texts")
    for text, loss in losses.items():
        print(f"{text:{width}}  {loss:.4f}")
    print(f"\nmerged_4_bit and merged_dense are in {options.output}, plain models of {options.dtype}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    standard = "(default: %(default)s)"
    add("--model", help="causal language model: hub id or folder (default: a tiny random one)")
    add("--adapter", type=Path, help="folder of an adapter over its 4-bit weights (default: trained here)")
    add("--data", help="file with a text a line to measure the loss on (default: made-up ones)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=f"of the dense weights {standard}")
    add("--steps", type=int, default=30, help=f"to train without --adapter {standard}")
    add("--learning-rate", type=float, default=5e-3, help=f"without --adapter {standard}")
    add("--output", type=Path, default=Path("merge_output"), help=standard)
    return parser


if __name__ == "__main__":
    sys.exit(main())
