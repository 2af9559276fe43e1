"""Fine-tune a causal language model with BoRA on any number of devices: GPUs with NCCL, CPUs with gloo.

    torchrun --nproc-per-node 2 examples/finetune_distributed.py --strategy fsdp
    torchrun --nproc-per-node 8 examples/finetune_distributed.py --strategy tp+fsdp --tensor-parallel 4 \\
        --model PATH --text data/*.txt --length 2048 --checkpointing --save run --export adapter.safetensors

Without --model it trains adapters on a small Llama with random weights that reads bytes, without --text on the source
code of this package: enough to see that the loss goes down. Only the adapters are trained, saved and exported.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import bora_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STRATEGIES = ("ddp", "fsdp", "tp", "tp+fsdp")
ROWWISE = ("o_proj", "down_proj")  # what tensor parallelism shards over inputs; over outputs all else


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be a file, got {text}, which is none")
    return Path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained, on what, and for how long."""
    add = parser.add_argument
    add("--model", metavar="PATH", help="a Llama-like model that transformers can load")
    add("--text", type=existing_file, nargs="+", metavar="FILE", help="what to train on")
    add("--adapter-rank", type=int, default=16, help="rank of the adapters (default: %(default)s)")
    add("--alpha", type=float, default=32, help="numerator of their scaling (default: %(default)s)")
    add("--norm-order", choices=("row_col", "col_row"), default="row_col", help="(default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="AdamW's learning rate (default: %(default)s)")
    add("--steps", type=int, default=20, help="optimizer steps in all (default: %(default)s)")
    add("--batch", type=int, default=8, help="sequences in a step over all ranks (default: %(default)s)")
    add("--micro-batches", type=int, default=1, help="parts whose gradients are accumulated (default: %(default)s)")
    add("--length", type=int, default=128, help="tokens in a sequence (default: %(default)s)")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen model (default: bfloat16 on GPUs)")
    add("--export", type=Path, metavar="FILE", help="leave the adapter here, in one safetensors file")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--strategy", choices=STRATEGIES, default="fsdp", help="what is sharded (default: %(default)s)")
    add("--tensor-parallel", type=int, metavar="N", help="ranks that share a layer (default: all, or 2 with fsdp)")
    add("--resume", type=Path, metavar="FOLDER", help="a checkpoint to go on from, of any strategy")
    add("--save", type=Path, metavar="FOLDER", help="leave a checkpoint here, written by all ranks")
    add_arguments(parser)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, as in: torchrun --nproc-per-node 2 examples/finetune_distributed.py")
    return arguments


# --- the model -------------------------------------------------------------------------------------------------------


def build_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """The frozen model with a BoRA layer for every linear one in its blocks; the same numbers on every rank."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32"))
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    else:
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.1,  # the frozen head has to tell bytes apart
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    for block in model.model.layers:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                layer = bora_kernels.FusedBoraLinear.from_linear(
                    linear, r=arguments.adapter_rank, alpha=arguments.alpha, norm_order=arguments.norm_order
                )
                block.set_submodule(name, layer)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def build_mesh(arguments: argparse.Namespace) -> DeviceMesh:
    """All ranks as [data, tensor]: ranks of a row share each layer, ranks of a column share the data."""
    world_size = dist.get_world_size()
    size = 1
    if "tp" in arguments.strategy:
        size = arguments.tensor_parallel or (world_size if arguments.strategy == "tp" else 2)
    if world_size % size or (arguments.strategy == "tp" and size != world_size):
        raise SystemExit(f"--tensor-parallel {size} does not fit {world_size} ranks and {arguments.strategy}")
    return init_device_mesh(arguments.device, (world_size // size, size), mesh_dim_names=("data", "tensor"))


def distribute(model: PreTrainedModel, mesh: DeviceMesh, arguments: argparse.Namespace) -> nn.Module:
    """Shard or replicate the model. Blocks are FSDP's units: each is gathered, used and freed as a whole."""
    if arguments.strategy == "ddp":
        return DistributedDataParallel(model.to(arguments.device))
    if "tp" in arguments.strategy:
        from bora_kernels.distributed import BoraColwiseParallel, BoraRowwiseParallel

        model.to(arguments.device)
        for block in model.model.layers:
            styles: dict[str, ParallelStyle] = {
                name: BoraRowwiseParallel() if name.endswith(ROWWISE) else BoraColwiseParallel()
                for name, module in block.named_modules()
                if isinstance(module, bora_kernels.FusedBoraLinear)
            }
            parallelize_module(block, mesh["tensor"], styles)
    if "fsdp" in arguments.strategy:
        # No param_dtype: it would round adapters to bfloat16, too. They are gathered in float32, the rest in its dtype.
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh["data"], mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return model.to(arguments.device)


# --- data ------------------------------------------------------------------------------------------------------------


def read_tokens(arguments: argparse.Namespace) -> Tensor:
    """All the text as one row of tokens: bytes for the small model, else those of the model's tokenizer."""
    files = arguments.text or sorted(Path(bora_kernels.__file__).parent.glob("**/*.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    if arguments.model:
        from transformers import AutoTokenizer

        tokens = torch.tensor(AutoTokenizer.from_pretrained(arguments.model)(text)["input_ids"])
    else:
        tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    if len(tokens) <= arguments.length:
        raise SystemExit(f"--text has {len(tokens)} tokens, --length {arguments.length} asks for more")
    return tokens


def micro_batches(tokens: Tensor, step: int, mesh: DeviceMesh, arguments: argparse.Namespace) -> list[Tensor]:
    """This rank's sequences of a step; the step alone decides which, so that a resumed run goes on with the next."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(tokens) - arguments.length, (arguments.batch,), generator=generator)
    batch = torch.stack([tokens[start : start + arguments.length] for start in starts.tolist()])
    ranks, rank = mesh["data"].size(), mesh["data"].get_local_rank()
    if arguments.batch % (ranks * arguments.micro_batches):
        raise SystemExit(f"--batch {arguments.batch} must divide by {ranks} ranks times --micro-batches")
    return list(batch.chunk(ranks)[rank].to(arguments.device).chunk(arguments.micro_batches))


# --- checkpoints -----------------------------------------------------------------------------------------------------


ADAPTERS = StateDictOptions(ignore_frozen_params=True, strict=False)  # what is saved


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Adapters, the optimizer's state and the step; each rank writes its shards."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=ADAPTERS)
    state = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(step)}
    dcp.save(state, checkpoint_id=folder)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What ``save_checkpoint`` left, into any strategy on any number of ranks; returns the step."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=ADAPTERS)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=ADAPTERS)
    return int(state["step"])


def export(model: nn.Module, file: Path) -> None:
    """The adapter whole, in one file, under the names of the model that is not distributed."""
    state = get_model_state_dict(model, options=replace(ADAPTERS, full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        from safetensors.torch import save_file

        save_file(state, file)


# --- training --------------------------------------------------------------------------------------------------------


def synchronization(model: nn.Module, last: bool):
    """Gradients travel only in the backward of the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def train(arguments: argparse.Namespace) -> None:
    mesh = build_mesh(arguments)
    tokens = read_tokens(arguments)
    model = distribute(build_model(arguments), mesh, arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.lr)
    first = load_checkpoint(arguments.resume, model, optimizer) if arguments.resume else 0
    if dist.get_rank() == 0:
        count = sum(parameter.numel() for parameter in trained)
        print(f"{arguments.strategy} on {dist.get_world_size()} × {arguments.device}, {count:,} trained parameters")

    for step in range(first, arguments.steps):
        start = time.perf_counter()
        parts = micro_batches(tokens, step, mesh, arguments)
        loss = torch.zeros((), device=arguments.device)
        for i, part in enumerate(parts):
            with synchronization(model, last=i == len(parts) - 1):
                part_loss = model(input_ids=part, labels=part, use_cache=False).loss / len(parts)
                part_loss.backward()
                loss += part_loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)  # also what makes the clock below that of the slowest rank
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - start
            speed = arguments.batch * arguments.length / seconds
            mean = loss.item() / dist.get_world_size()
            print(f"step {step + 1}/{arguments.steps}  loss {mean:.4f}  {speed:,.0f} tokens/s", flush=True)

    if arguments.save:
        save_checkpoint(arguments.save, model, optimizer, arguments.steps)
    if arguments.export:
        export(model, arguments.export)


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    try:
        train(arguments)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
