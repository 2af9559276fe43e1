"""BoRA in PEFT: importing this module makes PEFT know the method ``BORA_BIDIMENSIONAL``.

    from bora_kernels.integrations.peft import BoraConfig

    model = get_peft_model(model, BoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

Adapters saved from such a model load by ``PeftModel.from_pretrained`` wherever this module has been imported. Those
of earlier versions, of type "BORA", need ``config=BoraConfig.from_pretrained(folder)`` beside the folder, because
another method may own that name.
"""

try:
    import peft.mapping
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "peft":
        raise
    raise ModuleNotFoundError(
        "bora_kernels.integrations.peft needs PEFT, transformers and accelerate: "
        "pip install peft transformers accelerate",
        name="peft",
    ) from error

from . import needed  # noqa: F401 # before what would fail without it, or be passed over
from .config import PEFT_TYPE, BoraConfig
from .layers import BoraLayer
from .linear import BoraLinear
from .lora_files import convert_to_lora, save_as_lora
from .model import BoraModel
from .other_layers import BoraConv1d, BoraConv2d, BoraConv3d, BoraEmbedding
from .quantized import BoraQuantizedLinear

__all__ = [
    "BoraConfig",
    "BoraConv1d",
    "BoraConv2d",
    "BoraConv3d",
    "BoraEmbedding",
    "BoraLayer",
    "BoraLinear",
    "BoraModel",
    "BoraQuantizedLinear",
    "convert_to_lora",
    "save_as_lora",
]


def _register() -> None:
    """Enter PEFT's tables, which PEFT's own ``register_peft_method`` does for the names of its enumeration only.

    Raises ValueError, before any change, where another library has taken the name.
    """
    entries = (
        (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, BoraConfig),
        (peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, BoraModel),
        (peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, BoraModel.prefix),
    )
    for table, entry in entries:
        present = table.get(PEFT_TYPE, entry)
        if present != entry and not getattr(present, "__module__", "").startswith(f"{__name__}."):
            raise ValueError(f"PEFT's type {PEFT_TYPE} must be free for bora_kernels, got {present!r} there")
    for table, entry in entries:
        table[PEFT_TYPE] = entry


_register()
