"""Fused models under DDP and FSDP2: many processes compute what one does with the plain model."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.distributed import launch

peft = pytest.importorskip("peft")

from helpers.peft_models import make_base, make_ids, train_a_little  # noqa: E402

from bora_kernels import convert, fuse  # noqa: E402
from bora_kernels.fusion import mlp, shared  # noqa: E402

CASES = [(strategy, way) for strategy in ("ddp", "fsdp", "fsdp of single layers") for way in ("convert", "dora")]


def make(way):
    """A model whose adapters are off their start, on every rank the same."""
    if way == "dora":
        config = peft.LoraConfig(r=3, target_modules="all-linear", use_dora=True)
        return train_a_little(peft.get_peft_model(make_base(), config))
    model, generator = convert(make_base(), r=3), torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def train(model, ids):
    """Three steps; the trained parameters after them."""
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in trained.items()}
    return {name: p.detach() for name, p in whole.items()}


def train_in_parallel(strategy, way):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = fuse(make(way))
    layers = (model.base_model.model if way == "dora" else model).model.layers
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in layers:
            for unit in (layer.mlp.down_proj, layer.self_attn.k_proj) if "single" in strategy else (layer,):
                fully_shard(unit)
        fully_shard(model)
    half = make_ids(batch=4).chunk(2)[dist.get_rank()]
    with (
        mock.patch.object(mlp, "gated_mlp", wraps=mlp.gated_mlp) as mlps,
        mock.patch.object(shared, "shared_input", wraps=shared.shared_input) as groups,
    ):
        return train(model, half), mlps.call_count, groups.call_count


@pytest.fixture(scope="module")
def trained():
    return launch(train_cases, 2, CASES, timeout=200.0)[0]


def train_cases(cases):
    return {case: train_in_parallel(*case) for case in cases}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_three_steps_equal_those_of_one_process(trained, case):
    found, mlps, groups = trained[case]
    expected = train(make(case[1]), make_ids(batch=4))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    fallen_back = "single" in case[0]  # a layer that is gathered by its own call has to be called
    assert mlps == (0 if fallen_back else 6) and groups == 6  # of gate and up, or of q, k and v


def test_a_sharded_model_is_refused():
    assert all("model must not be sharded, got " in message for message in launch(refusal, 2))


def refusal():
    from torch.distributed.fsdp import fully_shard

    model = make("convert")
    fully_shard(model)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(ValueError) as error:
        fuse(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    return str(error.value)
