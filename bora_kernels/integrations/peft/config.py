"""``BoraConfig``: PEFT's ``LoraConfig`` with the options of BoRA."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ...adapters import files
from ...contract import NORM_ORDERS, Members, NormOrder


class _PeftType(str):
    """What PEFT expects of a member of its ``PeftType``, which is closed: a string with a ``value``."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:  # a member's, which PEFT takes apart at the dot
        return f"PeftType.{self.value}"

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


_IMPORT = "from bora_kernels.integrations.peft import BoraConfig"
_CARD = f"""
## How to load this adapter

Its method is BoRA (Bi-dimensional Weight-Decomposed Low-Rank Adaptation, arXiv 2412.06441) of the package bora-kernels.
PEFT knows it, by the type {files.PEFT_TYPE}, once that has been imported:

```python
{_IMPORT}  # noqa: F401
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or name of this adapter")
```
"""
PEFT_TYPE = _PeftType(files.PEFT_TYPE)

STARTS_FROM_BASE = ("pissa", "olora")  # starts of lora_A and lora_B that are taken out of the base weight
_INITS = "True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_[number of iterations]' or 'olora'"


@dataclass
class BoraConfig(LoraConfig):
    """Configuration of BoRA for PEFT: all of ``LoraConfig``'s options that mean something for BoRA, and two more.

        V  = W0 + s·B·A        s = lora_alpha / r  (lora_alpha / √r with ``use_rslora``)
        W' = diag(magnitude_row / ‖·‖_row)·V·diag(magnitude_col / ‖·‖_col)

    Args:
        norm_order: "row_col" (row norms first) or "col_row".
        detach_norm: constants for norms in backward instead of exact gradients. None, the default, is False for BoRA
            and True with ``use_dora``, as DoRA (section 4.3) and PEFT have it.
        use_dora: leave out the column magnitude. That is DoRA on the same kernels, with PEFT's results.
        columns_only: leave out the row magnitude: what DoRA is for rows, for the columns of the weight.

    Raises:
        ValueError: for an option that BoRA gives no meaning to (other variants of LoRA, ``lora_bias``,
            ``target_parameters``, data-driven initializations) or one out of range.

    Source: BoRA, arXiv 2412.06441, section 3; DoRA, arXiv 2402.09353, sections 4.1 and 4.3.
    """

    norm_order: NormOrder = field(
        default="row_col", metadata={"help": "Which norms are taken first: 'row_col' (of rows) or 'col_row'."}
    )
    detach_norm: bool | None = field(
        default=None,
        metadata={"help": "Treat norms as constants in backward. None: False for BoRA, True with use_dora."},
    )

    columns_only: bool = field(
        default=False, metadata={"help": "Leave out the row magnitude: DoRA over input features."}
    )

    @property
    def members(self) -> Members:
        """Which magnitudes the layers have."""
        return Members(row=not self.columns_only, col=not self.use_dora)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.detach_norm is None:
            self.detach_norm = self.use_dora
        if self.norm_order not in NORM_ORDERS:
            raise ValueError(f"norm_order must be one of {', '.join(NORM_ORDERS)}, got {self.norm_order!r}")
        if not isinstance(self.detach_norm, bool):
            raise ValueError(f"detach_norm must be True, False or None, got {self.detach_norm!r}")
        if not isinstance(self.columns_only, bool):
            raise ValueError(f"columns_only must be True or False, got {self.columns_only!r}")
        if self.columns_only and self.use_dora:
            raise ValueError(
                "columns_only must be False with use_dora, which leaves out the column magnitude, got True"
            )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        init = self.init_lora_weights
        named = isinstance(init, str) and re.fullmatch(r"gaussian|orthogonal|olora|pissa(_niter_\d+)?", init)
        if not (isinstance(init, bool) or named):
            raise ValueError(f"init_lora_weights must be {_INITS}, got {init!r}")
        variants = [f.name for f in fields(self) if f.metadata.get("is_lora_variant") and f.name != "use_dora"]
        for name in (*variants, "use_qalora", "lora_bias", "target_parameters", "megatron_config"):
            if getattr(self, name, None):
                raise ValueError(f"{name} is not supported with BoRA, got {getattr(self, name)!r}")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and into the model card beside it which import makes PEFT know the method."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if _IMPORT not in text:
            card.write_text(f"{text.rstrip()}\n{_CARD}" if text else _CARD.lstrip(), encoding="utf-8")

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The options of an ``adapter_config.json``, also of one that earlier versions wrote, of type "BORA".

        PEFT does not find this class by that type, so hand it the configuration:
        ``PeftModel.from_pretrained(model, folder, config=BoraConfig.from_pretrained(folder))``.

        Raises ValueError for another method of that name.
        """
        options = super().from_json_file(path_json_file, **kwargs)
        if options.get("peft_type") == files.FORMER_PEFT_TYPE:
            if "norm_order" not in options:
                raise ValueError(
                    f"{path_json_file} must have norm_order beside peft_type={files.FORMER_PEFT_TYPE!r}: "
                    "another method of that name wrote it"
                )
            options["peft_type"] = PEFT_TYPE
        return options
