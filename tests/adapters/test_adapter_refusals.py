"""Adapter files and models that do not fit each other: refused with a reason, before a model changes."""

import json

import pytest
import safetensors.torch as safetensors
import torch
from helpers.adapted_models import CONFIG, TENSORS, K, N, X, base, description, saved, trained
from safetensors import safe_open

from bora_kernels import adapter_state_dict, convert, load_adapter, merge_adapter, save_adapter
from bora_kernels.adapters.files import CHECKSUM, checksum


def rewrite(folder, tensors=(), header=(), config=(), drop=()):
    """Change what is in the files of a folder."""
    with safe_open(folder / TENSORS, "pt") as file:
        metadata = {**file.metadata(), **dict(header)}
    held = {**safetensors.load_file(folder / TENSORS), **dict(tensors)}
    kept = {name: tensor for name, tensor in held.items() if not name.endswith(tuple(drop))}
    del metadata[CHECKSUM]
    safetensors.save_file(kept, folder / TENSORS, metadata={**metadata, CHECKSUM: checksum(kept, metadata)})
    described = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**described, **dict(config)}))


UP = "base_model.model.block.up"
REFUSED = {
    "newer-format": ({"header": {"format_version": "3.0"}}, r"must have format 2.0 or older, got 3.0 of bora_kernels"),
    "no-format": ({"header": {"format_version": "new"}}, r"must have format 2.0 or older, got new"),
    "eps": ({"header": {"eps": "1e-6"}}, "must have eps 1e-12, got 1e-6"),
    "disagreement": ({"config": {"lora_alpha": 7}}, "must say the same, got .*alpha=5.* and .*alpha=7"),
    "peft-type": (
        {"config": {"peft_type": "LORA"}},
        "must have the peft_type BORA_BIDIMENSIONAL, or LORA with use_dora, got LORA",
    ),
    "pissa": ({"config": {"init_lora_weights": "pissa"}}, "init_lora_weights='pissa' changes the base weight"),
    "shape": (
        {"tensors": {f"{UP}.lora_magnitude_vector_row.weight": torch.ones(K)}},
        r"block.up.magnitude_row must be \[12\], got \[8\]",
    ),
    "rank": ({"tensors": {f"{UP}.lora_A.weight": torch.ones(4, K)}}, r"block.up.lora_A must be \[3, 8\], got \[4, 8\]"),
    "dtype": (
        {"tensors": {f"{UP}.lora_B.weight": torch.ones(N, 3).int()}},
        "block.up.lora_B must have a floating-point dtype, got torch.int32",
    ),
    "unknown-layer": ({"tensors": {"base_model.model.block.gate.lora_A.weight": X}}, "block.gate is unknown"),
    "unknown-tensor": (
        {"tensors": {"base_model.model.embedding.lora_embedding_A": X}},
        "embedding.lora_embedding_A is unknown",
    ),
    "no-linear": (
        {"tensors": {"base_model.model.norm.lora_A.weight": X}},
        "norm must be a torch.nn.Linear, got BatchNorm1d",
    ),
    "missing-tensor": ({"drop": ["up.lora_B.weight"]}, "block.up must have lora_B, got lora_A, magnitude_"),
    "column-in-dora": (
        {"header": {"method": "dora"}, "config": {"use_dora": True}},
        "block.down must not have magnitude_col; block.up must not have magnitude_col",
    ),
    "nothing": ({"drop": ["weight"]}, "must fit the model: it holds no adapted layer"),
    "head-shape": (
        {"tensors": {"base_model.model.head.weight": torch.ones(3, K)}},
        r"head.weight must be \[2, 8\], got \[3, 8\]",
    ),
    "head-dtype": (
        {"tensors": {"base_model.model.head.weight": torch.ones(2, K).double()}},
        "head.weight must fit into torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_unfit_files_are_refused_and_leave_the_model_alone(change, message, tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, **change)
    model = base()
    before = description(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert description(model) == before


CONVERTED = {
    "rank": ({"r": 4}, r"block.up must have the method, rank, .* \('bora', 4, 5, .* got \('bora', 3, 5,"),
    "alpha": ({"alpha": 6}, r"block.up must have the .*\('bora', 3, 6"),
    "method": ({"method": "dora"}, r"block.up must have the .*\('dora', 3, .* got \('bora'"),
    "norm-order": ({"norm_order": "col_row"}, "block.up must have the .*'col_row'.* got .*'row_col'"),
    "dtype": ({"adapter_dtype": torch.bfloat16}, "block.up.lora_A must fit into torch.bfloat16, got torch.float32"),
    "more-layers": ({"target_modules": ["up", "down", "head"]}, "must fit the model: head is missing"),
}


@pytest.mark.parametrize("options, message", CONVERTED.values(), ids=CONVERTED)
def test_models_converted_otherwise_are_refused_and_left_alone(options, message, tmp_path):
    saved(tmp_path)
    model = trained(**options)
    before = description(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert description(model) == before


def test_many_problems_are_counted(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, tensors={f"base_model.model.x{i}": X.clone() for i in range(9)})
    with pytest.raises(ValueError, match="x0 is unknown; .*x4 is unknown; and 4 more$"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_absent_files_are_named(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"path must be a folder with {TENSORS} or .*{name}"):
        load_adapter(base(), tmp_path / name)


def test_tensors_without_a_description_are_refused(tmp_path):
    safetensors.save_file(adapter_state_dict(trained()), tmp_path / TENSORS)
    with pytest.raises(ValueError, match=f"must have a header with format_version or {CONFIG} beside it, got neither"):
        load_adapter(base(), tmp_path)


def test_incomplete_configuration_is_refused(tmp_path):
    safetensors.save_file(adapter_state_dict(trained()), tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text('{"peft_type": "BORA_BIDIMENSIONAL", "r": 3}')
    with pytest.raises(ValueError, match="must say alpha, norm_order, got method, rank"):
        load_adapter(base(), tmp_path)


def test_layers_with_different_options_are_not_saved(tmp_path):
    model = convert(convert(base(), target_modules=["up"]), target_modules=["down"], norm_order="col_row")
    with pytest.raises(
        ValueError, match="must have the same options in all layers, got .*'row_col'.*block.down.*'col_row'"
    ):
        save_adapter(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("call", [adapter_state_dict, merge_adapter, lambda model: save_adapter(model, "folder")])
def test_models_without_adapters_are_refused(call):
    with pytest.raises(ValueError, match="model must (have|contain) adapted layers"):
        call(base())
