"""Private parts of PEFT and PyTorch's convolutions that this integration calls or takes the place of, looked for once.

PEFT would pass over a method that it calls by another name, and adapters would be wrong without a word.
"""

from __future__ import annotations

import peft
from peft.tuners import tuners_utils
from torch import nn

_OF = {
    peft.LoraModel: (
        "_prepare_model",
        "_create_new_module",
        "_enable_peft_forward_hooks",
        "_replace_module",
        "_cast_adapter_dtype",
        "_unload_and_optionally_merge",
        "_get_adapter_state_dict",
        "_remap_adapter_state_dict_for_load",
        "_convert_state_dict_for_initial_model",
    ),
    tuners_utils: ("_maybe_include_all_linear_layers",),
    tuners_utils.BaseTunerLayer: ("_active_adapter", "_disable_adapters"),
    nn.Conv1d: ("_conv_forward",),
    nn.Conv2d: ("_conv_forward",),
    nn.Conv3d: ("_conv_forward",),
}


def check() -> None:
    """Raise ImportError that names the version and what it lacks."""
    lacking = [f"{owner.__name__}.{name}" for owner, names in _OF.items() for name in names if not hasattr(owner, name)]
    if lacking:
        raise ImportError(
            "bora_kernels.integrations.peft needs what PEFT 0.21 has, got "
            f"PEFT {peft.__version__} without {', '.join(lacking)}"
        )


check()
