"""Adapters as LoRA files: the nearest of a rank or an error, what they leave out, and what is refused."""

import json
import math

import pytest
import torch
from helpers.adapted_models import CONFIG, TENSORS, X, base, methods, perturb, trained
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from bora_kernels import convert, load_adapter, save_adapter, save_as_lora
from bora_kernels.adapters.conversion import adapted_layers
from bora_kernels.reference import bora_weight_ref

PREFIX = "base_model.model."


def deltas(model):
    """W' − W0 of each layer by the reference, in float64."""
    found = {}
    for name, layer in adapted_layers(model).items():
        wide = [None if t is None else t.detach().double() for t in (layer.lora_A, layer.lora_B)]
        rows, cols = (None if t is None else t.detach().double() for t in (layer.magnitude_row, layer.magnitude_col))
        weight = layer.weight.double()
        adapted = bora_weight_ref(weight, *wide, rows, cols, scaling=layer.scaling, norm_order=layer.norm_order)
        found[name] = adapted - weight
    return found


def written(folder):
    """B·A of each layer of a file, in float64, as plain PEFT scales them."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    assert config["peft_type"] == "LORA" and config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"]
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")}
    factors = {n: (tensors[f"{n}.lora_B.weight"], tensors[f"{n}.lora_A.weight"]) for n in layers}
    return {name.removeprefix(PREFIX): B.double() @ A.double() for name, (B, A) in factors.items()}


def model_of_one_place(**options):
    """The model with each layer in one place."""
    model = base()
    model.again = nn.Linear(12, 8)
    return perturb(convert(model, **{"r": 3, "alpha": 5, **options}))


@methods
@pytest.mark.parametrize("norm_order", ["row_col", "col_row"])
def test_what_is_written_is_nearest_and_its_error_measured(method, norm_order, tmp_path):
    model = model_of_one_place(method=method, norm_order=norm_order)
    report = save_as_lora(model, tmp_path, rank=4, verbose=False)
    products, expected = written(tmp_path), deltas(model)
    assert products.keys() == expected.keys() == {"block.up", "block.down", "again"}
    for layer in report.layers:
        delta = expected[layer.name]
        singular = torch.linalg.svdvals(delta)
        lost = (delta - products[layer.name]).norm().item()
        assert lost == pytest.approx(singular[4:].norm().item(), rel=1e-4, abs=1e-6)
        assert layer.lost == pytest.approx(lost, rel=1e-5) and layer.rank == 4
        assert layer.error == pytest.approx(lost / delta.norm().item(), rel=1e-5)
        assert layer.shape == tuple(delta.shape)
    total = math.hypot(*(x.lost for x in report.layers)) / torch.cat([d.flatten() for d in expected.values()]).norm()
    assert report.error == pytest.approx(total.item(), rel=1e-5)


def test_all_ranks_lose_nothing(tmp_path):
    model = model_of_one_place()
    report = save_as_lora(model, tmp_path, rank=100, verbose=False)
    assert {layer.rank for layer in report.layers} == {8} and report.error < 1e-6
    for name, product in written(tmp_path).items():
        torch.testing.assert_close(product, deltas(model)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [0.5, 0.1, 1e-3])
def test_an_error_takes_the_smallest_rank_that_keeps_it(error, tmp_path):
    model = model_of_one_place()
    with torch.no_grad():
        model.again.lora_B.zero_()  # only its magnitudes have moved: no low rank at all
    report = save_as_lora(model, tmp_path, error=error, verbose=False)
    expected = deltas(model)
    for layer in report.layers:
        singular = torch.linalg.svdvals(expected[layer.name])
        assert layer.error <= error
        assert singular[layer.rank - 1 :].norm() > error * singular.norm(), layer
    assert (len({layer.rank for layer in report.layers}) > 1) == (error > 0.01)
    assert {name: p.shape for name, p in written(tmp_path).items()} == {n: d.shape for n, d in expected.items()}


@pytest.mark.parametrize("bound", [{"rank": 12}, {"error": 0.2}], ids=str)
def test_large_layers_by_subspace_iteration_are_near_the_best(bound, device, tmp_path):
    torch.manual_seed(3)
    model = convert(nn.Sequential(nn.Linear(640, 560, bias=False)), r=10, alpha=20, target_modules=["0"])
    layer = model[0]
    with torch.no_grad():  # a low-rank part over a floor of magnitudes, whose spectrum is flat
        layer.lora_B += 0.02 * torch.randn_like(layer.lora_B)
        layer.magnitude_row *= 1 + 0.02 * torch.randn(560)
        layer.magnitude_col *= 1 + 0.02 * torch.randn(640)
    model.to(device)
    singular = torch.linalg.svdvals(deltas(model)["0"])
    state = torch.get_rng_state()
    (found,) = save_as_lora(model, tmp_path, **bound, verbose=False).layers
    assert torch.equal(torch.get_rng_state(), state)
    if "rank" in bound:
        assert found.lost == pytest.approx(singular[12:].norm().item(), rel=0.01) and found.rank == 12
    else:
        tails = (singular.square().sum() - singular.square().cumsum(0)).clamp_min(0).sqrt() / singular.norm()
        best = 1 + int((tails > 0.2).sum())
        assert 1 < best <= found.rank <= best + max(1, best // 50) and found.error <= 0.2
    first = (tmp_path / TENSORS).read_bytes()
    save_as_lora(model, tmp_path, **bound, verbose=False)
    assert (tmp_path / TENSORS).read_bytes() == first


def test_small_changes_are_not_lost_in_rounding(tmp_path):
    model = convert(nn.Sequential(nn.Linear(24, 16)), r=2, alpha=2, target_modules=["0"])
    with torch.no_grad():
        model[0].lora_B += 1e-5 * torch.randn_like(model[0].lora_B)
    assert save_as_lora(model, tmp_path, rank=16, verbose=False).error < 1e-5
    product, expected = written(tmp_path)["0"], deltas(model)["0"]
    assert (product - expected).norm() < 1e-5 * expected.norm()


def test_the_table_comes_before_the_files(tmp_path, capsys):
    model = model_of_one_place()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        save_as_lora(model, tmp_path / "file", rank=2)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["layer", "block.up", "block.down", "again", "all"]
    report = save_as_lora(model, None, rank=2, verbose=False)
    assert capsys.readouterr().out == "" and str(report).splitlines() == printed
    assert f"{report.layers[0].error:.3%}" in printed[1]


def test_merged_layers_give_the_same_and_stay(tmp_path):
    model = model_of_one_place()
    before = model(X)
    save_as_lora(model, tmp_path / "a", rank=3, verbose=False)
    for layer in adapted_layers(model).values():
        layer.merge()
    save_as_lora(model, tmp_path / "b", rank=3, verbose=False)
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    assert all(layer.merged for layer in adapted_layers(model).values())
    for layer in adapted_layers(model).values():
        layer.unmerge()
    assert torch.equal(model(X), before)


def test_wrappers_are_looked_through(tmp_path, device):
    model = model_of_one_place().to(device)  # where DataParallel takes it
    save_as_lora(model, tmp_path / "plain", rank=2, verbose=False)
    save_as_lora(nn.DataParallel(torch.compile(model)), tmp_path / "wrapped", rank=2, verbose=False)
    for name in (TENSORS, CONFIG):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()


def test_an_adapter_from_a_file_is_converted(tmp_path):
    model = model_of_one_place(method="dora")
    save_adapter(model, tmp_path / "dora")
    fresh = base()
    fresh.again = nn.Linear(12, 8)
    fresh.load_state_dict({n.replace("_orig", ""): t for n, t in model.state_dict().items()}, strict=False)
    save_as_lora(load_adapter(fresh, tmp_path / "dora"), tmp_path / "lora", rank=2, verbose=False)
    save_as_lora(model, tmp_path / "direct", rank=2, verbose=False)
    assert (tmp_path / "lora" / TENSORS).read_bytes() == (tmp_path / "direct" / TENSORS).read_bytes()


def test_an_untrained_adapter_is_written_as_nothing(tmp_path):
    model = convert(nn.Sequential(nn.Linear(6, 5)), r=2, target_modules=["0"])
    report = save_as_lora(model, tmp_path, rank=2, verbose=False)
    assert report.error < 1 and torch.allclose(written(tmp_path)["0"], torch.zeros(5, 6).double(), atol=1e-6)


def nested(model):
    model.offset = nn.Parameter(torch.zeros(1))
    return model


def infinite(model):
    with torch.no_grad():
        model.again.magnitude_col[1] = math.inf
    return model


def sharded(model):
    layer = model.block["up"]
    layer.lora_B = nn.Parameter(TwoTensor(layer.lora_B.detach(), layer.lora_B.detach()))
    return model


REFUSED = {
    "neither": (lambda: model_of_one_place(), {}, "one of rank and error must be given"),
    "both": (lambda: model_of_one_place(), {"rank": 2, "error": 0.1}, "one of rank and error must be given"),
    "rank-0": (lambda: model_of_one_place(), {"rank": 0}, "rank must be an integer of at least 1, got 0"),
    "rank-float": (lambda: model_of_one_place(), {"rank": 0.5}, "rank must be an integer of at least 1, got 0.5"),
    "error-1": (lambda: model_of_one_place(), {"error": 1.0}, r"error must be in \[1e-06, 1\), got 1.0"),
    "error-nan": (lambda: model_of_one_place(), {"error": math.nan}, "error must be in"),
    "plain": (lambda: base(), {"rank": 2}, "model must have adapted layers"),
    "two-places": (lambda: trained(), {"rank": 2}, "in one place, got block.down as again too"),
    "nested": (lambda: nested(model_of_one_place()), {"rank": 2}, "must train whole modules"),
    "sharded": (lambda: sharded(model_of_one_place()), {"rank": 2}, "got a TwoTensor in block.up.lora_B: save_adapter"),
    "infinite": (lambda: infinite(model_of_one_place()), {"rank": 2}, "in again that is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(case, tmp_path):
    make, bounds, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        save_as_lora(make(), tmp_path / "lora", **bounds, verbose=False)
    assert not (tmp_path / "lora").exists()
