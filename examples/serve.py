"""Generate with a trained adapter: unmerged, merged into a plain model, and as a LoRA file.

    python examples/serve.py                                 # a tiny random model, an adapter made on the way
    python examples/serve.py --model M --adapter finetune_output/adapter --prompt "Once upon a time" --rank 32

--output holds ``merged``, a model of transformers for any server, and ``lora``, an adapter for servers that take LoRA
files. The table says what the LoRA file loses by layer, the end which texts are the same and how long a token takes.
docs/serving.md says which of the two to choose.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("peft", "transformers")


def main(arguments: list[str] | None = None) -> int:
    """Generate in three ways; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if missing := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        parser.exit(1, f'this example needs {", ".join(missing)}: pip install ".[examples]"\n')
    import _tiny
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bora_kernels.integrations.peft import save_as_lora

    dtype = getattr(torch, options.dtype)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    name = options.model or _tiny.language_model(options.output / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(name)

    def load(folder: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    adapter = options.adapter or _tiny.adapter(
        load(name), tokenizer, _tiny.texts(), options.output / "adapter", steps=options.steps, learning_rate=5e-3
    )
    prompts = options.prompt or ["the small", "the red cat"]
    texts = {"base": generate(load(name), tokenizer, prompts, options.tokens)}
    model = PeftModel.from_pretrained(load(name), adapter).eval()
    texts["adapter"] = generate(model, tokenizer, prompts, options.tokens)

    bound = {"rank": options.rank} if options.error is None else {"error": options.error}
    save_as_lora(model, options.output / "lora", **bound)
    model.merge_and_unload().save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")

    texts["merged"] = generate(load(options.output / "merged"), tokenizer, prompts, options.tokens)
    lora = PeftModel.from_pretrained(load(name), options.output / "lora").eval()
    texts["LoRA file"] = generate(lora, tokenizer, prompts, options.tokens)
    for way, (found, seconds) in texts.items():
        same = sum(a == b for a, b in zip(found, texts["adapter"][0], strict=True))
        print(f"\n{way}: {1e3 * seconds:.1f} ms a token, {same} of {len(found)} texts as with the adapter")
        print("\n".join(f"  {text}" for text in found))
    print(f"\nvllm serve {options.output / 'merged'}")
    print(
        f"vllm serve {name} --enable-lora --max-lora-rank {options.rank} --lora-modules mine={options.output / 'lora'}"
    )
    return 0


def generate(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> tuple[list[str], float]:
    """Greedy continuations, and the seconds that a token takes."""
    found, made, start = [], 0, time.perf_counter()
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        made += ids.shape[1] - inputs["input_ids"].shape[1]
        found.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return found, (time.perf_counter() - start) / max(1, made)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    standard = "(default: %(default)s)"
    add("--model", help="causal language model: hub id or folder (default: a tiny random one)")
    add("--adapter", type=Path, help="folder of an adapter that PEFT or save_adapter wrote (default: trained here)")
    add("--prompt", action="append", help="a text to continue; may be given several times")
    add("--tokens", type=int, default=12, help=f"to generate {standard}")
    add("--rank", type=int, default=16, help=f"of the LoRA file {standard}")
    add("--error", type=float, help="instead of a rank: what a layer may lose of its change, such as 0.2")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=standard)
    add("--steps", type=int, default=40, help=f"to train without --adapter {standard}")
    add("--output", type=Path, default=Path("serve_output"), help=standard)
    return parser


if __name__ == "__main__":
    sys.exit(main())
