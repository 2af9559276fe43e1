"""Records launches of Triton kernels and runs them again; see ``stage``. Knows nothing of what the kernels compute.

For users: ``plan_cache`` says and bounds what recordings take, ``replay_disabled`` turns them off.
"""

from .cache import plan_cache
from .switch import replay_disabled

__all__ = ["plan_cache", "replay_disabled"]
