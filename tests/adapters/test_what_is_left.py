"""What stays of this package in a model that was merged, and of a model that was deleted."""

import copy
import gc
import io
import weakref

import pytest
import torch
from helpers.fused_models import converted, peft
from helpers.peft_models import make_base, make_ids, train_a_little

from bora_kernels import fuse, merge_adapter, unfuse
from bora_kernels.integrations.peft import BoraConfig

IDS = make_ids()


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


def by_peft():
    return train_a_little(peft.get_peft_model(make_base(), BoraConfig(r=2, target_modules="all-linear")))


WAYS = {"convert": (converted, merge_adapter), "peft": (by_peft, lambda model: model.merge_and_unload())}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_merged_model_can_be_unpickled_without_the_package(way, fused):
    make, merge = WAYS[way]
    model = make()
    expected = model(input_ids=IDS).logits
    model = merge(fuse(model) if fused else model)
    assert b"bora_kernels" not in pickled(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    if fused:
        unfuse(model)  # as one that is still fused
        assert not [m for m in model.modules() if "_left_out_by_fuse" in m.__dict__]


@pytest.mark.parametrize("copied", [False, True])
def test_a_converted_model_that_is_deleted_is_freed_at_once(copied):
    model = copy.deepcopy(converted()) if copied else converted()
    model(input_ids=IDS, labels=IDS).loss.backward()
    held = [weakref.ref(model), weakref.ref(model.model.layers[0].mlp.down_proj)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_a_copy_saves_itself(tmp_path):
    model = converted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.fill_(3)
    with pytest.warns(UserWarning, match="save_pretrained of a converted model"):
        twin.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].eq(3).all()
    assert torch.load(io.BytesIO(pickled(model)), weights_only=False).save_pretrained is not model.save_pretrained
