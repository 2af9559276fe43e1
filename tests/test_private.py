"""Private parts of PyTorch: in one place, and without any of them the same results."""

import copy
import importlib.util
import re
import types
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bora_kernels import FusedBoraLinear, _private, convert, fuse
from bora_kernels.ops import transforms

PACKAGE = Path(_private.__file__).parent
# What else may be read where it is, and why.
ELSEWHERE = {
    "replay/device.py": "has what stands in for each",
    "ops/layouts.py": "compares in Python without it",
    "ops/triton_parts.py": "reads the public setting without it",
    "ops/convolution.py": "TorchDispatchMode is documented, its module's name is not",
    "quantized/weights.py": "DisableTorchFunctionSubclass is documented",
    "contract.py": "_unsafe_view is an operator of ATen",
}
LOOKS = re.compile(r"\btorch(?:\.\w+)*\._[a-zA-Z]|from torch[\w.]*\._|from torch[\w.]* import .*\b_[a-z]")
PARTS = {
    "saved_tensors_hooks": (torch._C._autograd, "_top_saved_tensors_default_hooks"),
    "transforming": (torch._C, "_are_functorch_transforms_active"),
    "backward_task": (torch._C, "_current_graph_task_id"),
    "has_global_hooks": (torch.nn.modules.module, "_has_any_global_hook"),
    "modes": (torch.utils._python_dispatch, "_get_current_dispatch_mode_stack"),
    "is_watched": (torch.utils._python_dispatch, "is_in_torch_dispatch_mode"),
    "exporting": (torch.compiler, "_is_exporting_flag"),
    "is_wrapper": (torch.utils._python_dispatch, "is_traceable_wrapper_subclass"),
}


def test_they_are_read_in_one_place():
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.name != "_private.py" and any(map(LOOKS.search, path.read_text(encoding="utf-8").splitlines()))
    }
    assert found == set(ELSEWHERE)


def loaded():
    """The file once more, as a version of PyTorch with what there is now would load it."""
    spec = importlib.util.spec_from_file_location("private_again", _private.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def without(monkeypatch):
    def take_away(name):
        with monkeypatch.context() as lacking:
            lacking.delattr(*PARTS[name])
            again = loaded()
        for each in PARTS:
            monkeypatch.setattr(_private, each, getattr(again, each))
        for each in ("transforming", "exporting"):
            monkeypatch.setattr(transforms, each, getattr(again, each))
        return again

    return take_away


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(*size, bias=False) for size in ((20, 24), (20, 24), (24, 20)))

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def step(model, checkpointed):
    x = torch.linspace(-1, 1, 60).view(3, 20).requires_grad_()
    (checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"x": x.grad, **gradients}


@pytest.mark.parametrize("name", PARTS)
def test_results_without_one_are_the_same(name, without):
    torch.manual_seed(0)
    model = convert(MLP(), r=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    models = [FusedBoraLinear(20, 24, 2), model, fuse(copy.deepcopy(model))]
    expected = [step(each, False) for each in models]
    without(name)
    for each, results in zip(models, expected, strict=True):
        for checkpointed in (False, True):
            for key, value in step(each, checkpointed).items():
                torch.testing.assert_close(value, results[key], msg=key)


def test_what_is_unknown_is_taken_for_the_slower_way(without):
    again = without("saved_tensors_hooks")
    assert again.saved_tensors_hooks(True) is not None
    again = without("has_global_hooks")
    assert again.has_global_hooks()
    for name in ("modes", "is_watched"):
        again = without(name)
        assert again.is_watched()
    again = without("is_wrapper")
    assert not again.is_wrapper(torch.ones(2)) and not again.is_wrapper(torch.nn.Parameter(torch.ones(2)))


def test_tensors_of_modules_that_keep_them_otherwise():
    module = torch.nn.BatchNorm1d(3)
    for name in ("weight", "running_mean"):
        assert _private.tensor_of(module, name) is getattr(module, name)
    other = types.SimpleNamespace(weight=torch.ones(2))  # neither of the dictionaries
    assert _private.tensor_of(other, "weight") is other.weight
    with pytest.raises(AttributeError, match="missing"):
        _private.tensor_of(module, "missing")


def test_a_graph_without_packed_tensors():
    class Ctx:
        _raw_saved_tensors = (torch.ones(1),)  # as older versions have them

    assert _private.raw_saved_tensors(Ctx()) is None and _private.raw_saved_tensors(object()) is None
    y = FusedBoraLinear(20, 24, 2)(torch.ones(1, 20))  # which keeps its graph
    can_unpack = hasattr(y.grad_fn._raw_saved_tensors[0], "unpack")  # PyTorch 2.11 cannot
    assert (_private.raw_saved_tensors(y.grad_fn) is not None) is can_unpack


@pytest.mark.parametrize("name", ["LoraModel._create_new_module", "tuners_utils._maybe_include_all_linear_layers"])
def test_a_peft_that_lacks_a_part_is_refused_by_name(name, monkeypatch):
    peft = pytest.importorskip("peft")
    from bora_kernels.integrations.peft import needed

    needed.check()
    owner, part = name.split(".")
    monkeypatch.delattr(peft.LoraModel if owner == "LoraModel" else peft.tuners.tuners_utils, part)
    with pytest.raises(ImportError, match=f"got PEFT {peft.__version__} without .*{name}"):
        needed.check()


@pytest.mark.parametrize("part", ["lora_variant", "scaling", "lora_dropout", "lora_A", "lora_B", "base_layer"])
def test_a_lora_layer_whose_parts_are_kept_elsewhere_runs_by_itself(part):
    """After ``fuse`` the forward of such a layer is its own, and ``explain`` has the sentence."""
    peft = pytest.importorskip("peft")
    from bora_kernels.fusion import members

    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 6)), config).base_model.model[0]
    assert isinstance(members.read(layer), members.Projection)
    parts = layer._modules if part in layer._modules else layer.__dict__
    del parts[part]
    assert re.fullmatch(f"this version of PEFT keeps a part of it elsewhere \\(.*{part}.*\\)", members.read(layer))
