"""What the adapters are put into: one linear layer, or a stack of decoder blocks with random weights."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bora_kernels import quantized

from .cases import DTYPES, Case

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


@dataclass(frozen=True)
class StackShape:
    """Sizes of a stack, and whose blocks they are: Qwen2's q, k and v have biases, Gemma-2's norms are of 1 + w."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int = 4
    family: str = "Llama"  # of transformers' classes
    head_width: int | None = None  # hidden / heads by default


STACKS = {
    "llama3-8b": StackShape(4096, 14336, 32, 8),
    "qwen2.5-7b": StackShape(3584, 18944, 28, 4, family="Qwen2"),
    "gemma2-9b": StackShape(3584, 14336, 16, 8, family="Gemma2", head_width=256),
    "tiny": StackShape(256, 704, 8, 2),
    "tiny-qwen2": StackShape(256, 704, 8, 2, family="Qwen2"),
    "tiny-gemma2": StackShape(256, 704, 4, 2, family="Gemma2", head_width=64),
}


class Workload:
    """A case's base model, its input x and the gradient dy of its output; the same values on every run.

    ``targets`` names the linear layers that get an adapter. ``root`` is what providers adapt and ``dense`` what the
    references do: the same modules, or those with the weights that the 4-bit ones of ``root`` stand for. ``layers``
    is the number of decoder blocks of a stack, that of its shape by default.
    """

    def __init__(self, case: Case, device: torch.device, layers: int | None = None) -> None:
        dtype = DTYPES[case.dtype]
        torch.manual_seed(0)
        with torch.device(device):
            if case.level == "layer":
                out_features, in_features = (int(size) for size in case.shape.split("x"))
                self.dense: nn.Module = _Layer(in_features, out_features, dtype)
                width = (in_features, out_features)
                self.targets = ["linear"]
            else:
                stack = STACKS[case.shape]
                stack = replace(stack, layers=layers or stack.layers)
                if stack.family != "Llama" and not HAS_TRANSFORMERS:
                    raise ModuleNotFoundError(f"{case.shape} needs transformers")
                self.dense = (_TransformersStack if HAS_TRANSFORMERS else _PlainStack)(stack, dtype)
                width = (stack.hidden, stack.hidden)
                names = (name for name, _ in self.dense.named_modules())
                self.targets = [name for name in names if name.endswith(_LINEARS)]
            self.x, self.dy = (torch.randn(case.batch, case.length, size, dtype=dtype) for size in width)
        self.dense.requires_grad_(False)
        self.root = self.dense if case.base == "dense" else _quantize(self.dense, self.targets)
        self.is_layer = case.level == "layer"
        self.weights = [linear_layer(self.dense, name).weight for name in self.targets]
        self.forward_flop = 2 * case.tokens * sum(weight.numel() for weight in self.weights)

    def copy(self, root: nn.Module, *, share: bool) -> nn.Module:
        """A new module tree like ``root`` or ``dense``, with the same weights (``share``) or copies of them."""
        tensors = (*root.parameters(), *root.buffers()) if share else ()
        return copy.deepcopy(root, {id(tensor): tensor for tensor in tensors})

    def callable(self, root: Any) -> nn.Module:
        """What is called in a step: the layer itself, without a wrapper around it, or the stack."""
        return root.linear if self.is_layer else root

    def set_mode(self, root: Any, *, training: bool, checkpointing: bool) -> None:
        root.train(training)
        if not self.is_layer:
            root.set_checkpointing(checkpointing)


def linear_layer(root: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name."""
    layer = root.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name} must be a torch.nn.Linear, got {type(layer).__name__}")
    return layer


@torch.no_grad()
def _quantize(dense: nn.Module, targets: list[str]) -> nn.Module:
    """A copy with NF4 layers (double quantization, as QLoRA has them); ``dense`` gets the weights they stand for."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    root: Any = copy.deepcopy(dense, {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())})
    for name in targets:
        weight = linear_layer(dense, name).weight
        out_features, in_features = weight.shape
        with torch.device("meta"):
            linear = Linear4bit(in_features, out_features, bias=False, compute_dtype=weight.dtype)
        linear.weight = Params4bit(
            weight.cpu().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
        )
        root.set_submodule(name, linear.to(weight.device))
        stored = quantized.read(linear)
        assert stored is not None
        weight.copy_(stored.dense(weight.dtype))
    root.is_loaded_in_4bit = True  # what PEFT looks at
    return root


class _Layer(nn.Module):
    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
        nn.init.normal_(self.linear.weight, std=in_features**-0.5)


class _TransformersStack(nn.Module):
    """``transformers.LlamaModel`` or its like on embeddings, with ``scaled_dot_product_attention`` as it is."""

    def __init__(self, shape: StackShape, dtype: torch.dtype) -> None:
        super().__init__()
        import transformers

        own: dict[str, Any] = {"head_dim": shape.head_width} if shape.head_width else {}
        if shape.family == "Gemma2":
            own |= {"query_pre_attn_scalar": shape.head_width, "attn_logit_softcapping": None}
        config = getattr(transformers, f"{shape.family}Config")(
            vocab_size=8,  # embeddings are given: the table is not used
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            num_hidden_layers=shape.layers,
            pad_token_id=None,
            attn_implementation="eager" if shape.family == "Gemma2" else "sdpa",
            **own,
        )
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.model = getattr(transformers, f"{shape.family}Model")(config)
        finally:
            torch.set_default_dtype(default)
        config._attn_implementation = "sdpa"  # refused of Gemma-2 for the cap that its attention does not have here
        with torch.no_grad():  # where norms are 1 and biases 0, a wrong use of them would be right
            for parameter in self.model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)

    def set_checkpointing(self, enabled: bool) -> None:
        name = "activation_checkpointing" if hasattr(self.model, "activation_checkpointing_enable") else None
        name = name or "gradient_checkpointing"  # its earlier name
        if enabled:
            getattr(self.model, f"{name}_enable")({"use_reentrant": False})
        else:
            getattr(self.model, f"{name}_disable")()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


class _PlainStack(nn.Module):
    """The same products without transformers: RMS norms, grouped causal attention (no rotation), SwiGLU."""

    def __init__(self, shape: StackShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_PlainBlock(shape, dtype) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-6, dtype=dtype)
        self.checkpointing = False

    def set_checkpointing(self, enabled: bool) -> None:
        self.checkpointing = enabled

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return self.norm(x)


class _PlainBlock(nn.Module):
    def __init__(self, shape: StackShape, dtype: torch.dtype) -> None:
        super().__init__()

        def linear(in_features: int, out_features: int) -> nn.Linear:
            layer = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
            nn.init.normal_(layer.weight, std=0.02)
            return layer

        kv_width = shape.hidden // shape.heads * shape.kv_heads
        self.q_proj = linear(shape.hidden, shape.hidden)
        self.k_proj, self.v_proj = (linear(shape.hidden, kv_width) for _ in range(2))
        self.o_proj = linear(shape.hidden, shape.hidden)
        self.gate_proj, self.up_proj = (linear(shape.hidden, shape.intermediate) for _ in range(2))
        self.down_proj = linear(shape.intermediate, shape.hidden)
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=1e-6, dtype=dtype)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=1e-6, dtype=dtype)
        self.head_width = shape.hidden // shape.heads

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        query, key, value = (
            p(h).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
