"""Fused kernels for BoRA, DoRA and LoRA linear layers (BoRA: arXiv 2412.06441)."""

from . import reference
from .autograd import bora_linear
from .modules import FusedBoraLinear, FusedDoraLinear
from .reuse import reuse_scales

__version__ = "0.1.0"
__all__ = ["FusedBoraLinear", "FusedDoraLinear", "__version__", "bora_linear", "reference", "reuse_scales"]
