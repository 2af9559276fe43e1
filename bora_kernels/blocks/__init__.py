"""Blocks of layers as one function each, which keep for backward what cannot be made anew, and nothing else."""

from .gated_mlp import gated_mlp
from .norms import NormOrigin, rms_norm
from .projection import Projection
from .shared_input import shared_input

__all__ = ["NormOrigin", "Projection", "gated_mlp", "rms_norm", "shared_input"]
