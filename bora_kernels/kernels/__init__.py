"""Triton kernels and their launchers, one file a job; ``fused`` puts them together into the layer."""
