"""Triton kernels and their launchers, one file a job; ``ops.triton_backend`` puts them together into the layer."""
