"""The layer beyond one device: parallel styles for ``torch.distributed.tensor.parallel.parallelize_module``."""

from .tensor_parallel import BoraColwiseParallel, BoraRowwiseParallel

__all__ = ["BoraColwiseParallel", "BoraRowwiseParallel"]
