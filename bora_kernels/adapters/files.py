"""The file format of adapters: ``adapter_model.safetensors`` and ``adapter_config.json`` in a folder, as PEFT has them.

Tensors are called ``base_model.model.<layer>.lora_A.weight``, ``.lora_B.weight``, ``.lora_magnitude_vector_row.weight``
and ``.lora_magnitude_vector_col.weight``, because rules for DoRA that other libraries have look for
``lora_magnitude_vector``; whatever else was trained is ``base_model.model.<its name>``. The safetensors header says all
that is needed to use the tensors, so that the file is enough by itself; the configuration tells PEFT the same. A
checksum in the header tells of bytes that changed since the file was written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _private
from .._version import __version__
from ..contract import EPS, NORM_ORDERS, NormOrder

FORMAT_VERSION = "2.0"  # a reader refuses a newer major version; a newer minor one only adds what it may ignore
CHECKSUM = "sha256"  # in the header
TENSOR_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude_row": "lora_magnitude_vector_row.weight",
    "magnitude_col": "lora_magnitude_vector_col.weight",
}
_CONFIG_KEYS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "norm_order": "norm_order",
    "detach_norm": "detach_norm",
    "rslora": "use_rslora",
    "dropout": "lora_dropout",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
PEFT_TYPE = "BORA_BIDIMENSIONAL"
FORMER_PEFT_TYPE = "BORA"  # format 1.0, which called the magnitudes lora_magnitude_row and lora_magnitude_col
# How PEFT may start lora_A and lora_B without changing the base weight, which its other ways do.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class AdapterDescription:
    """What the layers of an adapter share. The patterns map layers to a rank or alpha of their own, as in PEFT."""

    method: str
    rank: int
    alpha: float
    norm_order: NormOrder
    detach_norm: bool = False
    rslora: bool = False
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank_of(self, layer: str) -> int:
        return _lookup(self.rank_pattern, layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        return _lookup(self.alpha_pattern, layer, self.alpha)


def exact_pattern(layer: str) -> str:
    """The key of a pattern that fits this layer and no other."""
    return f"^{re.escape(layer)}"


def _lookup(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The first pattern, a regular expression, that fits the layer's name or its end after a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], description: AdapterDescription, config: Mapping[str, Any]
) -> None:
    """Write both files of an adapter of this package; ``config`` adds to the configuration."""
    sharded = [name for name, tensor in tensors.items() if _private.is_wrapper(tensor)]
    if sharded:
        kind = type(tensors[sharded[0]]).__name__
        raise ValueError(f"state_dict must hold whole tensors, got a {kind} for {sharded[0]}")
    header = {"format": "pt", "format_version": FORMAT_VERSION, "library_version": __version__, "eps": repr(EPS)}
    header |= {k: v if isinstance(v, str) else json.dumps(v) for k, v in asdict(description).items()}
    config = {
        "peft_type": PEFT_TYPE,
        "use_dora": description.method == "dora",
        "columns_only": description.method == "columns",
        **{key: getattr(description, name) for name, key in _CONFIG_KEYS.items()},
        **config,
    }
    tensors = copies(tensors)
    write_files(folder, tensors, {**header, CHECKSUM: checksum(tensors, header)}, config)


def write_files(
    folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Write tensors that ``copies`` made, with a header, and the configuration. A crash leaves no half-written file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    new_tensors, new_config = folder / f"{TENSOR_FILE}.new", folder / f"{CONFIG_FILE}.new"
    save_file(dict(tensors), new_tensors, metadata=dict(header))
    new_config.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new_tensors, folder / TENSOR_FILE)
    os.replace(new_config, folder / CONFIG_FILE)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, in memory that none shares with another, as safetensors wants them."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def read_adapter(path: Path) -> tuple[AdapterDescription, dict[str, Tensor]]:
    """The description and the tensors, without the names' prefix, of a folder or of the safetensors file alone.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: naming the file and the reason: it cannot be read, its bytes are not those that were written, its
            format is newer, its description incomplete, or header and configuration disagree.
    """
    file_path = path / TENSOR_FILE if path.is_dir() else path
    config_path = path / CONFIG_FILE if path.is_dir() else None
    if not file_path.is_file():
        raise FileNotFoundError(f"path must be a folder with {TENSOR_FILE} or a safetensors file, got {path}")
    known = []
    with _naming(file_path):
        header, tensors = _read_tensors(file_path)
        if "format_version" in header:
            known.append(_from_header(header, file_path))
    if config_path is not None and config_path.is_file():
        with _naming(config_path):
            known.append(_from_config(json.loads(config_path.read_text(encoding="utf-8")), config_path))
    if not known:
        raise ValueError(f"{file_path} must have a header with format_version or {CONFIG_FILE} beside it, got neither")
    if known[0] != known[-1]:
        raise ValueError(f"{file_path} and {config_path} must say the same, got {known[0]} and {known[-1]}")
    return known[0], tensors


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read, of which each library has errors of its own, is a ValueError here."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError and str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a file, without the names' prefix, as they were written."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = header.pop(CHECKSUM, None)
    always = not header.get("format_version", "1.").startswith("1.")  # as also where a damaged key hides it
    if (always or expected is not None) and expected != checksum(stored, header):
        raise ValueError(f"{path} must have the checksum in its header: it was damaged or changed since it was written")
    tensors = {present_name(name.removeprefix(PREFIX)): tensor for name, tensor in stored.items()}
    if len(tensors) < len(stored):
        raise ValueError(f"{path} must have one tensor of each name, got {', '.join(sorted(stored))}")
    return header, tensors


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of the rest of the header and of the tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def present_name(name: str) -> str:
    """A tensor's name with this version's for a magnitude of format 1.0, of PEFT's DoRA or of a diffusion model."""
    if found := re.search(r"\.[bl]ora_magnitude_(?:vector_)?(vector|row|col)(\.weight)?$", name):
        return f"{name[: found.start()]}.{SUFFIXES['magnitude_col' if found[1] == 'col' else 'magnitude_row']}"
    return name


def _from_header(header: Mapping[str, str], path: Path) -> AdapterDescription:
    version = header["format_version"]
    major = version.partition(".")[0]
    if not major.isdigit() or int(major) > int(FORMAT_VERSION.partition(".")[0]):
        writer = header.get("library_version", "an unknown version")
        raise ValueError(f"{path} must have format {FORMAT_VERSION} or older, got {version} of bora_kernels {writer}")
    if float(header.get("eps", "nan")) != EPS:
        raise ValueError(f"{path} must have eps {EPS}, got {header.get('eps')}")
    texts = ("method", "norm_order")
    values = {name: header[name] for name in ("method", *_CONFIG_KEYS) if name in header}
    return _description({k: v if k in texts else json.loads(v) for k, v in values.items()}, path)


def _from_config(config: Mapping[str, Any], path: Path) -> AdapterDescription:
    kind = config.get("peft_type")
    peft_dora = {"norm_order": "row_col", "detach_norm": True} if kind == "LORA" and config.get("use_dora") else {}
    if kind not in (PEFT_TYPE, FORMER_PEFT_TYPE) and not peft_dora:
        raise ValueError(f"{path} must have the peft_type {PEFT_TYPE}, or LORA with use_dora, got {kind}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ValueError(f"{path}: init_lora_weights={start!r} changes the base weight; load this adapter with PEFT")
    values = {name: config[key] for name, key in _CONFIG_KEYS.items() if config.get(key) is not None}
    method = "dora" if config.get("use_dora") else "columns" if config.get("columns_only") else "bora"
    return _description({"method": method, **peft_dora, **values}, path)


def _description(values: dict[str, Any], path: Path) -> AdapterDescription:
    missing = {"method", "rank", "alpha", "norm_order"} - values.keys()
    if missing:
        raise ValueError(f"{path} must say {', '.join(sorted(missing))}, got {', '.join(sorted(values))}")
    wrong = [f"{name}={value!r}" for name, value in values.items() if not _KINDS[name](value)]
    if wrong:
        raise ValueError(f"{path} must describe an adapter, got {', '.join(wrong)}")
    return AdapterDescription(**values)


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(value: object, is_entry: Callable[[object], bool]) -> bool:
    if not isinstance(value, dict) or not all(map(is_entry, value.values())):
        return False
    try:
        return all(map(re.compile, value))
    except re.error:
        return False


_KINDS: dict[str, Callable[[Any], bool]] = {
    "method": lambda value: isinstance(value, str),  # which ones there are is known to who makes layers
    "rank": _is_rank,
    "alpha": _is_number,
    "norm_order": lambda value: value in NORM_ORDERS,
    "detach_norm": lambda value: isinstance(value, bool),
    "rslora": lambda value: isinstance(value, bool),
    "dropout": lambda value: _is_number(value) and 0.0 <= value < 1.0,
    "rank_pattern": lambda value: _is_pattern(value, _is_rank),
    "alpha_pattern": lambda value: _is_pattern(value, _is_number),
}
