"""Norms are computed anew exactly when they have to be: in reuse_scales(), under checkpointing, and outside of both."""

from __future__ import annotations

import pytest
import torch
from helpers.accuracy import assert_equal
from helpers.cases import backends, require
from torch.utils.checkpoint import checkpoint

from bora_kernels import FusedBoraLinear, FusedDoraLinear, reuse_scales
from bora_kernels.contract import Members, scales_size, split_scales
from bora_kernels.ops import operators, reuse


@pytest.fixture
def computed(monkeypatch) -> list[bool]:
    """Notes each computation of norms: whether it kept the products of exact gradients."""
    calls = []
    forward = operators.forward

    def noting(*arguments, **options):
        if arguments[3] is None:  # scales
            calls.append(options["products"])
        return forward(*arguments, **options)

    monkeypatch.setattr(operators, "forward", noting)
    return calls


def make(device, backend="torch", cls=FusedBoraLinear, **options):
    require(backend, torch.float32)
    layer = cls(24, 20, r=2, device=device, **options)
    torch.nn.init.normal_(layer.lora_B)
    layer.backend = backend
    return layer, torch.randn(5, 24, device=device, requires_grad=True)


def gradients(layer, x, call=None):
    y = (call or layer)(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])]


@backends
@pytest.mark.parametrize("cls", [FusedBoraLinear, FusedDoraLinear])
def test_micro_batches_in_a_scope(backend, cls, device, computed):
    layer, x = make(device, backend, cls)
    expected = gradients(layer, x)
    with reuse_scales():
        for _ in range(3):
            assert_equal(gradients(layer, x), expected)
    assert len(computed) == 2  # once outside, once inside
    gradients(layer, x)
    gradients(layer, x)
    assert len(computed) == 4  # nothing is left of the scope


CHANGES = {
    "in place": lambda layer: layer.lora_A.detach().mul_(2),
    "magnitude": lambda layer: layer.magnitude_row.detach().add_(1),
    "weight": lambda layer: layer.weight.detach().mul_(2),
    "new storage": lambda layer: setattr(layer.lora_B, "data", layer.lora_B.data.clone() * 2),
    "new parameter": lambda layer: setattr(layer, "lora_B", torch.nn.Parameter(layer.lora_B.detach() * 2)),
    "scaling": lambda layer: setattr(layer, "scaling", 5.0),
    "norm_order": lambda layer: setattr(layer, "norm_order", "col_row"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_a_scope_are_seen(change, device, computed):
    layer, x = make(device)
    with reuse_scales():
        before = layer(x)
        CHANGES[change](layer)
        inside = gradients(layer, x)
    assert_equal(inside, gradients(layer, x))
    assert not torch.equal(inside[0], before) and len(computed) == 3


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_step_ends_the_reuse(optimizer, device, computed):
    layer, x = make(device)
    trained = [p for p in layer.parameters() if p.requires_grad]
    step = optimizer(trained, lr=0.1)
    with reuse_scales():
        layer(x).square().sum().backward()
        step.step()
        layer(x)
        assert len(computed) == 2
        step.step()  # even where a step changes nothing that a version shows
        layer.lora_B.data.mul_(2)
        inside = layer(x)
    assert torch.equal(inside, layer(x))


@backends
@pytest.mark.parametrize("order", ["row_col", "col_row"])
def test_float16_by_autocast_and_float32_in_one_scope(backend, order, device):
    """The scales of float16 may have a power of two moved between them; float32 takes the magnitudes as they are."""
    layer, x = make(device, backend, norm_order=order)
    with torch.no_grad():
        getattr(layer, f"magnitude_{order[:3]}").mul_(2.0**14)

    def both():
        results = []
        for enabled in (True, False, True):
            with torch.autocast(torch.device(device).type, torch.float16, enabled=enabled):
                y = layer(x)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), list(layer.parameters())[-4:])])
        return results

    expected = both()
    with reuse_scales():
        for actual, known in zip(both(), expected, strict=True):
            for one, other in zip(actual, known, strict=True):
                torch.testing.assert_close(one, other)


def test_outside_a_scope_every_change_is_seen(device):
    layer, x = make(device)
    before = layer(x)
    layer.lora_B.data.mul_(2)  # no version shows it
    assert not torch.equal(layer(x), before)


def test_training_after_evaluation_in_a_scope(device, computed):
    """Norms without the products of exact gradients do not serve a backward; norms with them serve all."""
    layer, x = make(device, "triton")
    expected = gradients(layer, x)
    with reuse_scales():
        with torch.no_grad():
            layer(x)
        assert_equal(gradients(layer, x), expected)
        with torch.no_grad():
            assert torch.equal(layer(x), expected[0])
        layer.detach_norm = True
        layer(x)
    assert computed == [True, False, True]


def test_nested_scopes(device, computed):
    layer, x = make(device)
    with reuse_scales():
        layer(x)
        with pytest.raises(RuntimeError, match="on purpose"), reuse_scales():
            layer(x)
            raise RuntimeError("on purpose")
        layer(x)
    assert len(computed) == 2 and not reuse._scopes


@backends
@pytest.mark.parametrize("detach_norm", [False, True], ids=["exact", "detached"])
def test_checkpoint_does_not_repeat_norms(backend, detach_norm, device, computed):
    layer, x = make(device, backend, detach_norm=detach_norm)
    expected = gradients(layer, x)
    for _ in range(2):
        assert_equal(gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False)), expected)
    assert len(computed) == 3  # the recomputations found theirs
    assert len(reuse._checkpointed) == 0  # and left nothing behind


def test_checkpointed_forwards_alone_reuse_nothing(device, computed):
    """A second forward is no recomputation: a change that no version shows must be seen."""
    layer, x = make(device)
    before = checkpoint(layer, x, use_reentrant=False)
    layer.lora_B.data.mul_(2)
    after = checkpoint(layer, x, use_reentrant=False)
    assert not torch.equal(after, before) and len(computed) == 2


def test_checkpoint_sees_changes_before_backward(device):
    """What autograd itself would refuse or recompute: scales of the parameters as they were do not serve."""
    layer, x = make(device)
    y = checkpoint(layer, x, use_reentrant=False)
    with torch.no_grad():
        layer.lora_B.mul_(2)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(dx, expected)


def test_inference_tensors(device, computed):
    with torch.inference_mode():
        layer, x = make(device)
        with reuse_scales():
            assert torch.equal(layer(x), layer(x))
    assert len(computed) == 2  # they have no version to compare


def test_training_after_inference_mode_in_a_scope(device, computed):
    """Scales that were made in inference mode serve inference; autograd cannot save them."""
    layer, x = make(device, detach_norm=True)
    expected = gradients(layer, x)
    with reuse_scales():
        for _ in range(2):
            with torch.inference_mode():
                assert torch.equal(layer(x), expected[0])
        assert len(computed) == 2
        for _ in range(2):
            assert_equal(gradients(layer, x), expected)
        with torch.inference_mode():
            layer(x)
    assert len(computed) == 3


@pytest.mark.parametrize("members", [Members(True, True), Members(True, False), Members(False, True)])
def test_what_a_forward_reads_lies_alike_with_and_without_products(members):
    """One recording serves both: it would read the word of cancelled lines from beyond the end of the shorter one."""
    places = []
    for products in (False, True):
        flat = torch.arange(scales_size((7, 5), 3, members, products))
        *read, row_product, col_product = split_scales(flat, (7, 5), 3, members)
        places.append([None if field is None else (field.data_ptr() - flat.data_ptr(), field.shape) for field in read])
        assert (row_product is not None, col_product is not None) == (
            products and members.row,
            products and members.col,
        )
    assert places[0] == places[1] and places[0][-1] is not None
