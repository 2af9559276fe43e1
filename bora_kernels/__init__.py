"""Fused kernels for BoRA, DoRA and LoRA linear layers (BoRA: arXiv 2412.06441)."""

from . import reference
from ._version import __version__
from .adapters.conversion import convert
from .adapters.diagnostics import explain
from .adapters.groups import parameter_groups
from .adapters.lora_files import save_as_lora
from .adapters.storage import adapter_state_dict, load_adapter, merge_adapter, save_adapter
from .adapters.warm_up import warm_up
from .functional import bora_linear
from .fusion.fuse import fuse, unfuse
from .modules import FusedBoraLinear, FusedColumnLinear, FusedDoraLinear
from .ops.reuse import reuse_scales
from .replay import replay_disabled
from .serving import AdapterBank, bora_linear_mixed

__all__ = [
    "AdapterBank",
    "FusedBoraLinear",
    "FusedColumnLinear",
    "FusedDoraLinear",
    "__version__",
    "adapter_state_dict",
    "bora_linear",
    "bora_linear_mixed",
    "convert",
    "explain",
    "fuse",
    "load_adapter",
    "merge_adapter",
    "parameter_groups",
    "reference",
    "replay_disabled",
    "reuse_scales",
    "save_adapter",
    "save_as_lora",
    "unfuse",
    "warm_up",
]
