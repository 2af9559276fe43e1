"""What replays ask of PyTorch's CUDA side, past the layers that cost host time: memory and the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

try:  # what the code that torch.compile generates allocates with: a third of the time of torch.empty
    from torch._C._dynamo.guards import _empty_strided_cuda as allocate  # type: ignore[attr-defined] # the stub leaves it out
except ImportError:

    def allocate(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialized memory on the current device."""
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


try:
    from torch._C import _cuda_getCurrentRawStream as current_stream
except ImportError:

    def current_stream(device: int) -> int:
        """The handle of the stream that this thread launches on."""
        return torch.cuda.current_stream(device).cuda_stream
