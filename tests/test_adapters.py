"""Adapters on disk: what is written, what is read back, what is refused before a model changes, and merging."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import bora_kernels
from bora_kernels import adapter_state_dict, convert, load_adapter, merge_adapter, save_adapter
from bora_kernels.conversion import adapted_layers, adapter_parameters

safetensors = pytest.importorskip("safetensors.torch", reason="adapter files need safetensors")
from safetensors import safe_open  # noqa: E402

K, N = 8, 12
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 3 * K).view(3, K)
methods = pytest.mark.parametrize("method", ["bora", "dora"])


class Model(nn.Module):
    """Linear layers, one of them in two places, a norm and a head."""

    def __init__(self, shared=True):
        super().__init__()
        self.block = nn.ModuleDict({"up": nn.Linear(K, N), "down": nn.Linear(N, K, bias=False)})
        self.again = self.block["down"] if shared else nn.Linear(N, K)
        self.norm = nn.BatchNorm1d(K)
        self.head = nn.Linear(K, 2)

    def forward(self, x):
        x = self.norm(self.block["down"](self.block["up"](x).relu()))
        return self.head(self.again(self.block["up"](x)))


def base(dtype=torch.float32):
    """The same pretrained model each time."""
    torch.manual_seed(0)
    return Model().to(dtype)


def trained(dtype=torch.float32, head=False, **options):
    """A converted model whose every trained tensor is off its start."""
    model = convert(base(dtype), **{"r": 3, "alpha": 5, **options})
    if head:
        model.head.requires_grad_()
        model.norm.requires_grad_()
        model(X.to(dtype))  # moves the running statistics of the norm
    return perturb(model)


def perturb(model):
    """Move every trained tensor off its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def saved(folder, **options):
    model = trained(**options)
    save_adapter(model, folder)
    return model


def description(model):
    """Modules, parameters with their flags and all values."""
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return list(model.named_modules()), parameters, {n: t.tolist() for n, t in model.state_dict().items()}


# ---- what is written ----


def test_names_are_those_of_peft_and_the_header_says_the_rest(tmp_path):
    model = saved(tmp_path / "new" / "folder", norm_order="col_row")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {TENSORS, CONFIG}
    with safe_open(folder / TENSORS, "pt") as file:
        header, names = file.metadata(), set(file.keys())
    kinds = ("lora_A", "lora_B", "lora_magnitude_row", "lora_magnitude_col")
    assert names == {f"base_model.model.block.{name}.{kind}.weight" for name in ("up", "down") for kind in kinds}
    expected = {"format": "pt", "format_version": "1.0", "method": "bora", "rank": "3", "alpha": "5"}
    expected |= {"norm_order": "col_row", "eps": "1e-12", "library_version": bora_kernels.__version__}
    assert expected.items() <= header.items()
    tensors, state = safetensors.load_file(folder / TENSORS), adapter_state_dict(model)
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == ["block.up", "block.down"] and config["modules_to_save"] is None
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_dora"]) == ("BORA", 3, 5, False)


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
    config = {"peft_type": "BORA", "r": 2, "lora_alpha": 4, "norm_order": "row_col", "detach_norm": False}
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
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch
        from bora_kernels import load_adapter
        from test_adapters import Model
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        model = Model()
        model.load_state_dict(expected["base"])
        assert torch.equal(load_adapter(model, {str(tmp_path)!r}).eval()(expected["x"]), expected["y"])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


# ---- what is refused ----


def rewrite(folder, tensors=(), header=(), config=(), drop=()):
    """Change what is in the files of a folder."""
    with safe_open(folder / TENSORS, "pt") as file:
        metadata = {**file.metadata(), **dict(header)}
    held = {**safetensors.load_file(folder / TENSORS), **dict(tensors)}
    kept = {name: tensor for name, tensor in held.items() if not name.endswith(tuple(drop))}
    safetensors.save_file(kept, folder / TENSORS, metadata=metadata)
    described = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**described, **dict(config)}))


UP = "base_model.model.block.up"
REFUSED = {
    "newer-format": ({"header": {"format_version": "2.0"}}, r"must have format 1.0 or older, got 2.0 of bora_kernels"),
    "no-format": ({"header": {"format_version": "new"}}, r"must have format 1.0 or older, got new"),
    "eps": ({"header": {"eps": "1e-6"}}, "must have eps 1e-12, got 1e-6"),
    "disagreement": ({"config": {"lora_alpha": 7}}, "must say the same, got .*alpha=5.* and .*alpha=7"),
    "peft-type": ({"config": {"peft_type": "LORA"}}, "must have the peft_type BORA, or LORA with use_dora, got LORA"),
    "pissa": ({"config": {"init_lora_weights": "pissa"}}, "init_lora_weights='pissa' changes the base weight"),
    "shape": (
        {"tensors": {f"{UP}.lora_magnitude_row.weight": torch.ones(K)}},
        r"block.up.magnitude_row must be \[12\], got \[8\]",
    ),
    "rank": ({"tensors": {f"{UP}.lora_A.weight": torch.ones(4, K)}}, r"block.up.lora_A must be \[3, 8\], got \[4, 8\]"),
    "dtype": (
        {"tensors": {f"{UP}.lora_B.weight": torch.ones(N, 3).int()}},
        "block.up.lora_B must be a floating-point tensor, got torch.int32",
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
    (tmp_path / CONFIG).write_text('{"peft_type": "BORA", "r": 3}')
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


# ---- merging ----


@methods
def test_merged_model_is_plain(method):
    model = trained(method=method, dtype=torch.bfloat16, head=True)
    weights = {name: layer.effective_weight() for name, layer in adapted_layers(model).items()}
    y = model(X.bfloat16())
    head = model.head
    assert merge_adapter(model) is model
    assert not adapted_layers(model) and model.again is model.block["down"] and model.head is head
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is nn.Linear and torch.equal(model.get_submodule(name).weight, weight)
    torch.testing.assert_close(model(X.bfloat16()), y, rtol=0.02, atol=0.02)


def test_merging_a_tied_weight_says_so():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, K), "lm_head": nn.Linear(K, 5, bias=False)})
    model["lm_head"].weight = model["embedding"].weight
    before = model["embedding"].weight.clone()
    convert(model, target_modules=["lm_head"])
    nn.init.normal_(model["lm_head"].lora_B)
    with pytest.warns(UserWarning, match="lm_head shared its weight with embedding and no longer does"):
        merge_adapter(model)
    assert torch.equal(model["embedding"].weight, before) and not torch.equal(model["lm_head"].weight, before)


def test_two_adapters_for_one_shared_layer_are_refused(tmp_path):
    model = convert(Model(shared=False), r=2, target_modules=["down", "again"])
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="must fit the model: block.down is the same layer as again"):
        load_adapter(Model(), tmp_path)


# ---- PEFT ----


@pytest.fixture
def peft():
    """PEFT, knowing BoRA."""
    pytest.importorskip("bora_kernels.integrations.peft", reason="the PEFT integration is needed")
    return pytest.importorskip("peft")


def unshared():
    """PEFT adapts a shared layer in its first place only."""
    torch.manual_seed(0)
    return Model(shared=False)


@methods
@pytest.mark.parametrize("head", [False, True], ids=["adapter", "adapter-and-head"])
def test_peft_loads_what_is_saved(method, head, peft, tmp_path):
    options = {"method": method, "norm_order": "col_row", "rslora": True}
    model = convert(unshared(), r=2, alpha=4, target_modules=["up"], **options)
    convert(model, r=3, alpha=6, target_modules=["down"], **options)
    if head:
        model.head.requires_grad_()
    perturb(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(unshared(), tmp_path).eval()
    assert torch.equal(theirs(X), model(X))
    theirs.save_pretrained(tmp_path)
    again = load_adapter(unshared(), tmp_path).eval()
    assert torch.equal(again(X), model(X))


@methods
@pytest.mark.parametrize("head", [None, ["head"]], ids=["adapter", "adapter-and-head"])
def test_what_peft_saves_is_loaded(method, head, peft, tmp_path):
    from bora_kernels.integrations.peft import BoraConfig

    config = BoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["up", "down"],
        rank_pattern={"down": 3},
        alpha_pattern={"block.down": 5},
        use_dora=method == "dora",
        modules_to_save=head,
    )
    theirs = perturb(peft.get_peft_model(unshared(), config))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(unshared(), tmp_path).eval()
    assert torch.equal(model(X), theirs(X))
    assert {n: (m.r, m.alpha) for n, m in adapted_layers(model).items()} == {"block.up": (2, 4), "block.down": (3, 5)}


def test_dora_of_peft_is_loaded(tmp_path):
    """To rounding: PEFT takes the norms in another way."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], use_dora=True)
    theirs = perturb(peft.get_peft_model(unshared(), config))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(unshared(), tmp_path).eval()
    assert {type(layer) for layer in adapted_layers(model).values()} == {bora_kernels.FusedDoraLinear}
    assert all(layer.detach_norm for layer in adapted_layers(model).values())
    torch.testing.assert_close(model(X), theirs(X))
