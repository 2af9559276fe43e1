"""Adapters on disk: what is written and read back."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.adapted_models import CONFIG, TENSORS, K, N, X, base, methods, perturb, saved, trained
from torch import nn

import bora_kernels
from bora_kernels import adapter_state_dict, convert, load_adapter, save_adapter
from bora_kernels.adapters.conversion import adapted_layers, adapter_parameters

safetensors = pytest.importorskip("safetensors.torch", reason="adapter files need safetensors")
from safetensors import safe_open  # noqa: E402

# ---- what is written ----


def test_names_are_those_of_peft_and_the_header_says_the_rest(tmp_path):
    model = saved(tmp_path / "new" / "folder", norm_order="col_row")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {TENSORS, CONFIG}
    with safe_open(folder / TENSORS, "pt") as file:
        header, names = file.metadata(), set(file.keys())
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector_row", "lora_magnitude_vector_col")
    assert names == {f"base_model.model.block.{name}.{kind}.weight" for name in ("up", "down") for kind in kinds}
    expected = {"format": "pt", "format_version": "2.0", "method": "bora", "rank": "3", "alpha": "5"}
    expected |= {"norm_order": "col_row", "eps": "1e-12", "library_version": bora_kernels.__version__}
    assert expected.items() <= header.items()
    tensors, state = safetensors.load_file(folder / TENSORS), adapter_state_dict(model)
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == ["block.up", "block.down"] and config["modules_to_save"] is None
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (3, 5, False)
    assert config["peft_type"] == "BORA_BIDIMENSIONAL"


def test_targets_of_the_configuration_mean_no_other_layer(tmp_path):
    model = nn.ModuleDict({"up": nn.Linear(K, N), "inner": nn.ModuleDict({"up": nn.Linear(K, N)})})
    convert(model, target_modules="up")
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "up"  # as a string a whole name


def test_saving_over_an_adapter_replaces_it(tmp_path):
    saved(tmp_path, r=2)
    model = saved(tmp_path, r=4, alpha=1)
    other = load_adapter(base(), tmp_path).eval()
    assert torch.equal(other(X), model(X)) and not list(tmp_path.glob("*.new"))


def test_whole_tensors_come_from_a_state_dict(tmp_path):
    model = trained()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)  # as little as a sharded model may hold
    save_adapter(model, tmp_path, state_dict=state)
    assert torch.equal(load_adapter(base(), tmp_path).eval()(X), trained()(X))


def test_compiled_model_is_saved_under_plain_names(tmp_path):
    model = trained()
    model.block["up"] = torch.compile(model.block["up"], backend="eager")
    names = adapter_state_dict(torch.compile(model, backend="eager")).keys()
    assert names == adapter_state_dict(trained()).keys()


WRAPPERS = {
    "averaged": torch.optim.swa_utils.AveragedModel,
    "data-parallel": nn.DataParallel,
    "compiled-inside": lambda model: torch.optim.swa_utils.AveragedModel(torch.compile(model, backend="eager")),
    "compiled-outside": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("own_state", [False, True], ids=["", "state_dict"])
def test_wrapped_models_are_saved_and_loaded_under_plain_names(wrap, own_state, tmp_path):
    wrapped = wrap(trained(head=True))
    save_adapter(wrapped, tmp_path, state_dict=wrapped.state_dict() if own_state else None)
    assert adapter_state_dict(wrapped).keys() == adapter_state_dict(trained(head=True)).keys()
    expected = trained(head=True)(X)
    assert torch.equal(load_adapter(base(), tmp_path).eval()(X), expected)
    other = wrap(base())
    assert load_adapter(other, tmp_path) is other
    y = other.eval()(X)
    rounding = {} if y.is_cuda else {"rtol": 0, "atol": 0}  # DataParallel answers on a GPU where there is one
    torch.testing.assert_close(y.cpu(), expected, **rounding)


def test_a_model_under_ddp_is_saved_under_plain_names(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(trained(head=True))
        save_adapter(wrapped, tmp_path)
        assert adapter_state_dict(wrapped).keys() == adapter_state_dict(trained(head=True)).keys()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(load_adapter(base(), tmp_path).eval()(X), trained(head=True)(X))


def test_a_child_called_module_keeps_its_name(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.ModuleDict({"module": nn.Linear(K, N), "other": nn.Linear(K, N)})

    changed = perturb(convert(model()))
    save_adapter(torch.optim.swa_utils.AveragedModel(changed), tmp_path, state_dict=changed.state_dict())
    loaded = load_adapter(model(), tmp_path)
    assert all(torch.equal(loaded[name](X), changed[name](X)) for name in ("module", "other"))


# ---- what is read back ----


@methods
@pytest.mark.parametrize("head", [False, True], ids=["adapter", "adapter-and-head"])
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file-alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_exact(method, head, whole, dtype, tmp_path):
    options = {"norm_order": "col_row", "detach_norm": True, "rslora": True, "dropout": 0.1}
    model = saved(tmp_path, method=method, head=head, dtype=dtype, **options)
    path = tmp_path
    if not whole:
        (tmp_path / CONFIG).unlink()
        path = tmp_path / TENSORS
    other = base(dtype)
    assert load_adapter(other, str(path)) is other
    other.eval()
    assert torch.equal(other(X.to(dtype)), model(X.to(dtype)))
    assert other.again is other.block["down"]
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    for name, layer in adapted_layers(model).items():
        twin = other.get_submodule(name)
        assert type(twin) is type(layer) and repr(twin) == repr(layer) and twin.rslora == layer.rslora
        assert {p.dtype for p in adapter_parameters(twin).values()} == {torch.float32}


@pytest.mark.gpu
@methods
def test_round_trip_on_a_gpu(method, tmp_path):
    model = trained(method=method, dtype=torch.bfloat16, head=True).cuda()
    save_adapter(model, tmp_path)
    other = load_adapter(base(torch.bfloat16).cuda(), tmp_path).eval()
    assert {p.device.type for p in other.parameters()} == {"cuda"}
    assert torch.equal(other(X.bfloat16().cuda()), model(X.bfloat16().cuda()))


def test_layers_of_several_ranks_and_alphas(tmp_path):
    model = convert(base(), r=2, alpha=4, target_modules=["up"])
    convert(model, r=3, alpha=6, target_modules=["down"])
    convert(model, r=3, alpha=4, target_modules=["head"])
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["rank_pattern"]) == (3, {"^block\\.up": 2})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {"^block\\.down": 6})
    other = load_adapter(base(), tmp_path)
    assert {n: (m.r, m.alpha) for n, m in adapted_layers(other).items()} == {
        "block.up": (2, 4),
        "block.down": (3, 6),
        "head": (3, 4),
    }


def test_folder_without_a_header_is_described_by_its_configuration(tmp_path):
    """As PEFT saves it: patterns fit the ends of names, and magnitudes may be wider than factors."""
    model = convert(base(), r=2, alpha=4, target_modules=["up"])
    convert(model, r=3, alpha=6, target_modules=["down"])
    tensors = {n: t.bfloat16() if "lora_A" in n or "lora_B" in n else t for n, t in adapter_state_dict(model).items()}
    safetensors.save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    config = {"peft_type": "BORA_BIDIMENSIONAL", "r": 2, "lora_alpha": 4, "norm_order": "row_col", "detach_norm": False}
    config |= {"rank_pattern": {"down": 3}, "alpha_pattern": {r"bl.*\.down": 6}, "target_modules": ["up", "down"]}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_dropout": 0.5, "use_rslora": False, "bias": "none"}))
    layers = adapted_layers(load_adapter(base(), tmp_path))
    assert {n: (m.r, m.alpha, m.dropout) for n, m in layers.items()} == {
        "block.up": (2, 4, 0.5),
        "block.down": (3, 6, 0.5),
    }
    assert layers["block.up"].lora_A.dtype == torch.float32


def test_loading_into_a_converted_model_keeps_its_parameters(tmp_path):
    model = saved(tmp_path, head=True)
    other = convert(base(), r=3, alpha=5)
    other.head.requires_grad_()
    parameters = dict(other.named_parameters())
    adapted_layers(other)["block.up"].merge()
    load_adapter(other, tmp_path)
    assert all(parameter is parameters[name] for name, parameter in other.named_parameters())
    assert torch.equal(other.eval()(X), model(X))


def test_training_resumes_to_the_bit(tmp_path):
    def train(model, optimizer, steps):
        for step in steps:
            x = X * (1 + step)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def start():
        model = convert(base(), r=3).eval()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    straight = start()
    train(*straight, range(6))
    model, optimizer = start()
    train(model, optimizer, range(3))
    save_adapter(model, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model, optimizer = start()
    load_adapter(model, tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(model, optimizer, range(3, 6))
    expected = adapter_state_dict(straight[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state_dict(model).items())


def test_loading_in_another_process_without_peft(tmp_path):
    model = saved(tmp_path, method="dora")
    torch.save({"base": base().state_dict(), "x": X, "y": model(X)}, tmp_path / "expected.pt")
    script = f"""
        import sys
        sys.modules["peft"] = sys.modules["transformers"] = None
        sys.path[:] = {sys.path!r}
        import torch
        from bora_kernels import load_adapter
        from helpers.adapted_models import Model
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        model = Model()
        model.load_state_dict(expected["base"])
        assert torch.equal(load_adapter(model, {str(tmp_path)!r}).eval()(expected["x"]), expected["y"])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
