"""Several adapters over one base layer in one batch: a bank of adapters, and the layer that takes one for each entry.

bank = AdapterBank(linear.weight, max_adapters=8)
bank.add("french", layer_of_a_converted_model)
bank.add("code", (lora_A, lora_B, magnitude_row, None), scaling=2.0)          # DoRA
index = bank.index(["french", "code", None, "french"])                        # once a batch; None is the base
y = bora_linear_mixed(x, linear.weight, bank, index, linear.bias)             # x [4, tokens, K]
"""

from ..contract import Adapter
from .bank import BASE, AdapterBank
from .index import BatchIndex
from .linear import bora_linear_mixed

__all__ = ["BASE", "Adapter", "AdapterBank", "BatchIndex", "bora_linear_mixed"]
