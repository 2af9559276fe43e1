"""BoRA in PEFT: importing this module makes PEFT know the method "BORA".

    from bora_kernels.integrations.peft import BoraConfig

    model = get_peft_model(model, BoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

Adapters saved from such a model load by ``PeftModel.from_pretrained`` wherever this module has been imported.
"""

import peft.mapping

from .config import PEFT_TYPE, BoraConfig
from .layers import BoraConv1d, BoraConv2d, BoraConv3d, BoraEmbedding, BoraLayer, BoraLinear
from .model import BoraModel
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
]

# peft.utils.register_peft_method accepts only the names of PEFT's own enumeration.
peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BoraConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BoraModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BoraModel.prefix
