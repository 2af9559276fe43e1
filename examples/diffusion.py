"""Adapt a diffusion model of diffusers, a UNet or a transformer, and save and load it in both ways there are.

    python examples/diffusion.py --kind unet                 # tiny random models and noise, seconds on a CPU
    python examples/diffusion.py --kind transformer
    python examples/diffusion.py --kind unet --model stabilityai/sd-turbo --latents latents.safetensors

``--model`` is a pipeline (hub id or folder), whose ``unet`` or ``transformer`` is taken. ``--latents`` is a safetensors
file of what the pipeline's own encoders make of your images and texts: ``latents`` [M, C, H, W], ``states`` [M, T, D]
and, for a transformer, ``pooled`` [M, D']. In a training script of diffusers change two places: ``adapt`` for its
LoraConfig, and ``save`` at the end, because diffusers' own loaders take LoRA alone.

The targets are those of the LoRA scripts of diffusers. --output holds ``bora``, for ``PeftModel.from_pretrained``,
and ``lora``, the nearest LoRA, for ``pipe.load_lora_weights`` and everything else that reads LoRA.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARIES = ("diffusers", "peft", "tqdm")
_STEPS = 1000  # of the noise schedule
TARGETS = {
    "unet": ["to_k", "to_q", "to_v", "to_out.0"],
    "transformer": [
        *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    ],
}


def main(arguments: list[str] | None = None) -> int:
    """Train, save and load; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if missing := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        parser.exit(1, f'this example needs {", ".join(missing)}: pip install ".[examples,integrations]"\n')
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    data = {name: t.to(device) for name, t in load_data(options).items()}
    base = load_model(options).to(device)
    model = adapt(base, options)
    losses = train(model, data, options)
    print(f"\nloss {losses[0]:.4f} over the first steps, {losses[-1]:.4f} over the last")

    model.eval()
    batch = {name: t[:2] for name, t in data.items()}
    expected = predict(model, batch)
    save(model, options)
    loaded = load(load_model(options).to(device), options.output / "bora").eval()
    print(f"loaded as BoRA: largest difference {(predict(loaded, batch) - expected).abs().max():.1e}")
    plain = load_model(options).to(device).eval()
    change = (expected - predict(plain, batch)).norm()
    plain.load_lora_adapter(
        options.output / "lora", prefix=options.kind, weight_name="pytorch_lora_weights.safetensors"
    )
    print(f"loaded as LoRA by diffusers: off by {(predict(plain, batch) - expected).norm() / change:.1%} of the change")
    return 0


# --- what a script of diffusers needs of this -------------------------------------------------------------------------


def adapt(model: nn.Module, options: argparse.Namespace) -> Any:
    """The model with a BoRA adapter, in the place of ``model.add_adapter(LoraConfig(...))``."""
    from peft import get_peft_model

    from bora_kernels.integrations.peft import BoraConfig

    targets = TARGETS[options.kind] + (options.also.split(",") if options.also else [])
    return get_peft_model(model, BoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets))


def save(model: Any, options: argparse.Namespace) -> None:
    """The adapter as it is, and the nearest LoRA as a pipeline's ``save_lora_weights`` writes it."""
    from safetensors.torch import save_file

    from bora_kernels.integrations.peft import convert_to_lora

    model.save_pretrained(options.output / "bora")
    _, tensors, report = convert_to_lora(model, rank=options.lora_rank, verbose=False)
    print(f"as LoRA of rank {options.lora_rank}: {report.error:.1%} of the change of the weights is lost")
    names = {f"{options.kind}.{name.removeprefix('base_model.model.')}": t for name, t in tensors.items()}
    (options.output / "lora").mkdir(parents=True, exist_ok=True)
    save_file(names, options.output / "lora" / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})


def load(model: nn.Module, folder: Path) -> Any:
    """The adapter over the base model, in a later process; ``merge_and_unload()`` makes it a plain model."""
    from peft import PeftModel

    import bora_kernels.integrations.peft  # noqa: F401  (makes PEFT know the method)

    return PeftModel.from_pretrained(model, folder)


# --- training on noise that was added ---------------------------------------------------------------------------------


def train(model: nn.Module, data: dict[str, Tensor], options: argparse.Namespace) -> list[float]:
    """Mean losses of stretches of a tenth of the steps."""
    from tqdm import tqdm

    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=options.learning_rate, weight_decay=0.0
    )
    losses = []
    for _ in (bar := tqdm(range(options.steps), desc="training", unit="step")):
        rows = torch.randint(len(data["latents"]), (options.batch_size,), device=data["latents"].device)
        batch = {name: t[rows] for name, t in data.items()}
        noise = torch.randn_like(batch["latents"])
        t = torch.rand(len(rows), device=noise.device)
        level = t.view(-1, 1, 1, 1)
        if options.kind == "unet":  # predicts the noise
            noisy, target = (1 - level).sqrt() * batch["latents"] + level.sqrt() * noise, noise
        else:  # predicts the velocity of a rectified flow
            noisy, target = (1 - level) * batch["latents"] + level * noise, noise - batch["latents"]
        loss = (call(model, noisy, t, batch) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    part = max(1, len(losses) // 10)
    return [sum(losses[i : i + part]) / len(losses[i : i + part]) for i in range(0, len(losses), part)]


def call(model: nn.Module, noisy: Tensor, t: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """What the model predicts; t from 0 (data) to 1 (noise)."""
    pooled = {"pooled_projections": batch["pooled"]} if "pooled" in batch else {}
    timestep = (t * (_STEPS - 1)).round() if not pooled else t * _STEPS
    return model(noisy, timestep=timestep, encoder_hidden_states=batch["states"], **pooled).sample


@torch.no_grad()
def predict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    t = torch.linspace(0.2, 0.8, len(batch["latents"]), device=batch["latents"].device)
    return call(model, batch["latents"], t, batch)


# --- models and data --------------------------------------------------------------------------------------------------


def load_model(options: argparse.Namespace) -> Any:
    """The denoiser of the pipeline, or a tiny one of random weights."""
    import diffusers

    kinds = {"unet": diffusers.UNet2DConditionModel, "transformer": diffusers.SD3Transformer2DModel}
    if options.model:
        return kinds[options.kind].from_pretrained(options.model, subfolder=options.kind)
    sizes: dict[str, Any] = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
    if options.kind == "unet":
        sizes |= {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
        sizes |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 12}
        sizes |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    else:
        sizes |= {"patch_size": 2, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
        sizes |= {"caption_projection_dim": 16, "joint_attention_dim": 12, "pooled_projection_dim": 10}
        sizes |= {"pos_embed_max_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kinds[options.kind](**sizes)


def load_data(options: argparse.Namespace) -> dict[str, Tensor]:
    """Latents and what they are conditioned on, by name."""
    if options.latents:
        from safetensors.torch import load_file

        return load_file(options.latents)
    data = {"latents": 0.1 * torch.randn(16, 4, 8, 8) + torch.randn(16, 4, 1, 1), "states": torch.randn(16, 5, 12)}
    return data | ({"pooled": torch.randn(16, 10)} if options.kind == "transformer" else {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    standard = "(default: %(default)s)"
    add("--kind", choices=tuple(TARGETS), default="unet", help=standard)
    add("--model", help="pipeline: hub id or folder (default: a tiny random model)")
    add("--latents", help="safetensors file of latents, states and, for a transformer, pooled (default: noise)")
    add("--also", help="more targets, with commas between, such as conv1,conv2 of a UNet")
    add("--rank", type=int, default=8, help=f"of the adapter; alpha is the same {standard}")
    add("--lora-rank", type=int, default=16, help=f"of the LoRA file {standard}")
    add("--learning-rate", type=float, default=5e-3, help=f"1e-4 for a real model {standard}")
    add("--steps", type=int, default=60, help=standard)
    add("--batch-size", type=int, default=8, help=standard)
    add("--seed", type=int, default=0, help=standard)
    add("--output", type=Path, default=Path("diffusion_output"), help=standard)
    return parser


if __name__ == "__main__":
    sys.exit(main())
