"""Quantized weights of bitsandbytes and torchao: ``read(linear)`` makes of a layer what ``bora_linear`` takes."""

from .weights import Layout, Quantized, dense, quantize_like, read

__all__ = ["Layout", "Quantized", "dense", "quantize_like", "read"]
