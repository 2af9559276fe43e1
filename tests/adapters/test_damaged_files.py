"""Adapter files whose bytes changed: refused by name and with a reason, or read as they were."""

import json
import random
import re

import pytest
import torch
from helpers.adapted_models import CONFIG, TENSORS, base, description, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bora_kernels import adapter_state_dict, load_adapter


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def flip(data, rng):
    """Bits of one to three bytes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def insert(data, rng):
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.randint(1, 9)) + data[place:]


def overwrite(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(rng.randint(1, 64)) + data[place + 64 :]


def change_text(data, rng):
    """A word of what can be read, so that more than the syntax is wrong."""
    words = list(re.finditer(rb'[A-Za-z_]{3,}|-?\d+(\.\d+)?|""', data))
    word = rng.choice(words)
    return data[: word.start()] + rng.choice([b"1", b"0", b"null", b"[]", b"{}", b"bora", b"-3e9"]) + data[word.end() :]


DAMAGES = (cut, flip, insert, overwrite, change_text)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [TENSORS, CONFIG])
@pytest.mark.parametrize("options", [{"head": True}, {"adapter_dtype": torch.bfloat16, "norm_order": "col_row"}])
def test_damaged_files_are_refused_by_name_or_read_as_they_were(damage, name, options, tmp_path):
    expected = adapter_state_dict(saved(tmp_path, **options))
    whole, model = (tmp_path / name).read_bytes(), base()
    before, rng = description(model), random.Random(f"{damage.__name__} {name}")
    refused = 0
    for _ in range(60):
        (tmp_path / name).write_bytes(damage(whole, rng))
        try:
            load_adapter(model, tmp_path)
        except ValueError as error:
            assert type(error) is ValueError and str(tmp_path) in str(error), repr(error)
            assert description(model) == before
            refused += 1
        else:
            held = adapter_state_dict(model)
            assert held.keys() <= expected.keys()  # of a head only what requires a gradient is told by a model
            assert all(torch.equal(tensor, expected[key]) for key, tensor in held.items())
            model = base()
            before = description(model)
    assert refused >= (55 if name == TENSORS and damage is not change_text else 1)


def test_every_byte_of_the_tensors_is_told_from_another(tmp_path):
    """A flipped bit leaves a file that can be read: only the checksum tells."""
    saved(tmp_path, r=1)
    path = tmp_path / TENSORS
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="checksum in its header: it was damaged or changed since it was written"):
            load_adapter(base(), path)


def test_a_file_without_a_checksum_is_read(tmp_path):
    """As are those that PEFT wrote, and of versions before; the present one always writes it."""
    expected = adapter_state_dict(saved(tmp_path))
    with safe_open(tmp_path / TENSORS, "pt") as file:
        header = {key: value for key, value in file.metadata().items() if key != "sha256"}
    tensors = {key: tensor.clone() for key, tensor in load_file(tmp_path / TENSORS).items()}  # no views of the file
    save_file(tensors, tmp_path / TENSORS, metadata=header)
    with pytest.raises(ValueError, match="must have the checksum in its header"):
        load_adapter(base(), tmp_path)
    save_file(tensors, tmp_path / TENSORS, metadata={**header, "format_version": "1.0"})
    held = adapter_state_dict(load_adapter(base(), tmp_path))
    assert all(torch.equal(held[key], tensor) for key, tensor in expected.items())


WRONG = {
    "rank": {"r": 2.5},
    "boolean-rank": {"r": True},
    "alpha": {"lora_alpha": "8"},
    "norm-order": {"norm_order": "rows"},
    "detach-norm": {"detach_norm": "no"},
    "rslora": {"use_rslora": 1},
    "dropout": {"lora_dropout": 1.0},
    "pattern": {"rank_pattern": {"up": 0}},
    "expression": {"alpha_pattern": {"(": 2}},
    "patterns": {"rank_pattern": ["up"]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_values_of_the_wrong_kind_are_named(change, tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=f"{CONFIG} must describe an adapter, got "):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", '{"peft_type": ', b"\xff\xfe", ""], ids=repr)
def test_a_configuration_that_is_none_is_named(text, tmp_path):
    saved(tmp_path)
    (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{CONFIG} cannot be read: "):
        load_adapter(base(), tmp_path)


def test_two_names_of_one_tensor_are_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.block.up.lora_magnitude_row.weight"] = torch.ones(12)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        header = {key: value for key, value in file.metadata().items() if key != "sha256"}
    save_file(tensors, tmp_path / TENSORS, metadata={**header, "format_version": "1.0"})
    with pytest.raises(ValueError, match="must have one tensor of each name"):
        load_adapter(base(), tmp_path)
