"""Records launches of Triton kernels and runs them again; see ``stage``. Knows nothing of what the kernels compute."""
