"""Fused kernels for BoRA, DoRA and LoRA linear layers (BoRA: arXiv 2412.06441)."""

from . import reference
from .adapters import adapter_state_dict, load_adapter, merge_adapter, save_adapter
from .autograd import bora_linear
from .conversion import convert
from .diagnostics import explain
from .modules import FusedBoraLinear, FusedDoraLinear
from .reuse import reuse_scales

__version__ = "0.1.0"
__all__ = [
    "FusedBoraLinear",
    "FusedDoraLinear",
    "__version__",
    "adapter_state_dict",
    "bora_linear",
    "convert",
    "explain",
    "load_adapter",
    "merge_adapter",
    "reference",
    "reuse_scales",
    "save_adapter",
]
