"""A small model trained on one process or on many: what the tests of distributed training compare."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from helpers.accuracy import assert_accurate
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bora_kernels import FusedBoraLinear, FusedDoraLinear
from bora_kernels.distributed import BoraColwiseParallel, BoraRowwiseParallel

WIDTH, HIDDEN, RANK, OUTPUTS = 22, 37, 3, 5  # 2 and 4 ranks divide none of them but WIDTH by 2
STEPS, BATCH, TOKENS = 5, 8, 3
ADAPTERS = StateDictOptions(ignore_frozen_params=True, strict=False)  # what a checkpoint is of


@dataclass(frozen=True)
class Run:
    """How the model is trained; the defaults are one process in float32."""

    strategy: str = "single"  # or "ddp", "fsdp", "tp", "fsdp_tp" (pairs of ranks are tensor parallel)
    order: str = "row_col"
    detach_norm: bool = False
    checkpointing: str = ""  # "inside" the forward of a block, or a wrapper put on "before" or "after" sharding
    precision: str = "fp32"  # "bf16_policy": float32 parameters cast by FSDP; "bf16_base": only the frozen are bf16
    peft: bool = False  # the layers are those of the PEFT integration
    micro_batches: int = 1
    offload: bool = False
    sequence: bool = False  # between the layers of tensor parallel blocks, tokens are sharded
    dora: bool = False

    def __str__(self) -> str:
        parts = [self.strategy, self.order, "detached" if self.detach_norm else "exact", self.precision]
        parts += ["peft"] if self.peft else []
        parts += [f"checkpointing_{self.checkpointing}"] if self.checkpointing else []
        parts += [f"{self.micro_batches}micro_batches"] if self.micro_batches > 1 else []
        parts += ["offload"] if self.offload else []
        parts += ["sequence"] if self.sequence else []
        parts += ["dora"] if self.dora else []
        return "-".join(parts)


class Block(nn.Module):
    """A residual block of two layers, one with a bias and one without."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        options = {"r": RANK, "norm_order": run.order, "detach_norm": run.detach_norm}
        layer = FusedDoraLinear if run.dora else FusedBoraLinear
        self.up = layer(WIDTH, HIDDEN, **options)
        self.down = layer(HIDDEN, WIDTH, bias=False, **options)
        self.checkpointing = run.checkpointing == "inside"

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing:
            return checkpoint(self.residual, x, use_reentrant=False)
        return self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Two blocks and a frozen head; the adapters are off their start."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block(run) for _ in range(2))
        self.head = nn.Linear(WIDTH, OUTPUTS).requires_grad_(False)
        if run.peft:
            adapt_by_peft(self, run)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
                elif "magnitude" in name:
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
                elif not parameter.requires_grad and run.precision == "bf16_base":
                    parameter.data = parameter.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapt_by_peft(model: Model, run: Run) -> None:
    """Replace the layers by linear ones that PEFT adapts."""
    from peft import inject_adapter_in_model

    from bora_kernels.integrations.peft import BoraConfig

    for block in model.blocks:
        block.up, block.down = block.up.to_linear(), block.down.to_linear()
    options = {"norm_order": run.order, "detach_norm": run.detach_norm}
    inject_adapter_in_model(BoraConfig(r=RANK, lora_alpha=32, target_modules=["up", "down"], **options), model)


def train(
    run: Run,
    device: str = "cpu",
    *,
    exact: bool = False,
    steps: range = range(STEPS),
    resume: str | None = None,
    save: str | None = None,
) -> dict[str, Tensor]:
    """The loss and every gradient [steps, ...] and every trained parameter after the last step.

    With ``exact`` the dense reference computes in float64, on the values that ``run`` starts from. ``resume`` and
    ``save`` name the folder of a checkpoint to start from and to leave.
    """
    model = Model(run).to(device)
    if exact:
        model.double()
        for block in model.blocks:
            block.up.backend = block.down.backend = "reference"
    model = distribute(run, model, device)
    trained = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    if resume:
        load_checkpoint(resume, model, optimizer)
    dtype = torch.float64 if exact else torch.float32 if run.precision == "fp32" else torch.bfloat16
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(STEPS, BATCH, TOKENS, WIDTH, generator=generator).to(device, dtype)
    targets = torch.randn(STEPS, BATCH, TOKENS, OUTPUTS, generator=generator).to(device, dtype if exact else None)
    records: dict[str, list[Tensor]] = {name: [] for name in ("loss", *(f"d_{name}" for name in trained))}
    recorded = gathered if "tp" in run.strategy else local
    for step in steps:
        loss = targets.new_zeros(())
        micro_batches = list(zip(split(run, xs[step]), split(run, targets[step]), strict=True))
        for i, (x, target) in enumerate(micro_batches):
            with synchronization(run, model, last=i == len(micro_batches) - 1):
                part = F.mse_loss(predict(run, model, x, exact).to(target.dtype), target) / len(micro_batches)
                (part / tensor_parallel_size(run) if run.sequence else part).backward()  # parts of a mean
                loss += part.detach()
        if run.strategy != "single":
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        records["loss"].append(loss)
        for name, parameter in trained.items():
            records[f"d_{name}"].append(recorded(parameter.grad).clone())
        optimizer.step()
        optimizer.zero_grad()
    if save:
        save_checkpoint(save, model, optimizer)
    results = {name: torch.stack(values) for name, values in records.items()}
    results |= {name: recorded(parameter.detach()) for name, parameter in trained.items()}
    return gather(results) if run.strategy == "fsdp" else {name: t.cpu() for name, t in results.items()}


def distribute(run: Run, model: Model, device: str) -> nn.Module:
    """The model as the strategy of ``run`` trains it."""
    blocks = model.blocks
    if run.checkpointing == "before":
        for i, block in enumerate(blocks):
            blocks[i] = checkpoint_wrapper(block)
    if run.strategy == "ddp":
        return DistributedDataParallel(model)
    if run.strategy != "single":
        size = tensor_parallel_size(run)
        mesh = init_device_mesh(device, (dist.get_world_size() // size, size), mesh_dim_names=("dp", "tp"))
    if "tp" in run.strategy:
        tokens = Shard(0) if run.sequence else None
        for block in blocks:
            styles = {
                "up": BoraColwiseParallel(input_layouts=tokens),
                "down": BoraRowwiseParallel(output_layouts=tokens),
            }
            parallelize_module(block, mesh["tp"], styles)
    if "fsdp" in run.strategy:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if run.precision == "bf16_policy" else None, reduce_dtype=torch.float32
        )
        options = {"mesh": mesh["dp"], "mp_policy": policy}
        if run.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device != "cpu")
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
    if run.checkpointing == "after":
        for i, block in enumerate(blocks):
            blocks[i] = checkpoint_wrapper(block)
    return model


def split(run: Run, batch: Tensor) -> tuple[Tensor, ...]:
    """The micro-batches of this rank."""
    if run.strategy != "single":
        replicas = 1 if run.sequence else tensor_parallel_size(run)
        batch = batch.chunk(dist.get_world_size() // replicas)[dist.get_rank() // replicas]
    return batch.chunk(run.micro_batches)


def tensor_parallel_size(run: Run) -> int:
    """How many ranks share a layer."""
    if run.strategy == "tp":
        return dist.get_world_size()
    return 2 if run.strategy == "fsdp_tp" else 1


def synchronization(run: Run, model: nn.Module, *, last: bool):
    """Gradients are reduced only in the backward of the last micro-batch."""
    if "fsdp" in run.strategy:
        model.set_requires_gradient_sync(last)
    return model.no_sync() if run.strategy == "ddp" and not last else nullcontext()


def predict(run: Run, model: nn.Module, x: Tensor, exact: bool) -> Tensor:
    """The model's output; on one process the policy's casts are made here."""
    if run.strategy == "single" and run.precision == "bf16_policy" and not exact:
        return functional_call(model, {name: p.bfloat16() for name, p in model.named_parameters()}, x)
    return model(x)


def save_checkpoint(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Adapters and the optimizer's state, each rank its shards."""
    names = ("model", "optimizer")
    dcp.save(dict(zip(names, get_state_dict(model, optimizer, options=ADAPTERS), strict=True)), checkpoint_id=folder)


def load_checkpoint(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same on any number of ranks."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=ADAPTERS)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=ADAPTERS)


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor, or all where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded in any way."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all ranks in one exchange; gradients have the steps before the rows."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {name: t.cpu() for name, t in results.items()})
    whole = {name: torch.cat([rank[name] for rank in ranks], dim=int(name.startswith("d_"))) for name in results}
    return whole | {"loss": results["loss"].cpu()}


@functools.cache
def single(run: Run, device: str, exact: bool) -> dict:
    return train(run, device, exact=exact)


def train_all(runs: list[Run], device: str = "cpu") -> list[dict]:
    return [train(run, device) for run in runs]


def assert_as_on_one_process(actual: dict, run: Run, device: str = "cpu") -> None:
    """By the accuracy rule: "plain" is the layer on one process, "exact" the dense reference in float64."""
    one = replace(run, strategy="single", checkpointing="", micro_batches=1, offload=False)
    triple = actual, single(one, device, exact=False), single(one, device, exact=True)
    for names, samples in (({"loss"}, STEPS), (actual.keys() - {"loss"}, RANK * WIDTH)):
        assert_accurate(*({name: results[name] for name in names} for results in triple), samples=samples)
