"""The layer inside PyTorch: operators, torch.compile, autocast, checkpointing, saved tensors, determinism."""

import shutil

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch._dynamo.testing
from helpers.accuracy import assert_equal
from helpers.cases import Case, backends, check_layer, orders, require, run, variants
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from bora_kernels import FusedBoraLinear, FusedDoraLinear, bora_linear

pytestmark = pytest.mark.sampled(4)
SMALL = {"M": 5, "N": 20, "K": 24, "R": 2}


def make_module(backend, device, cls=FusedBoraLinear, **options):
    """A layer after some training, from 24 to 20 features."""
    module = cls(24, 20, r=2, device=device, **options)
    torch.nn.init.normal_(module.lora_B)
    module.backend = backend
    return module


def results_of(call, module, x):
    """The output, and the gradients of x and of the trained parameters."""
    x = x.detach().requires_grad_()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    y = call(x)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]


# ---- operators ----


class Recorder(TorchDispatchMode):
    """Notes every call of this package's operators, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "bora_kernels":
            self.calls.append((operator, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        return operator(*args, **(kwargs or {}))


CALLS = {
    "bora-row_col": (Case(**SMALL), {}),
    "bora-row_col-autocast": (Case(**SMALL), {}),
    "bora-col_row-detached-bf16-autocast": (
        Case(**SMALL, order="col_row", dtype=torch.bfloat16),
        {"detach_norm": True},
    ),
    "dora-fp16": (Case(**SMALL, member="dora", dtype=torch.float16), {}),
    "lora-nobias": (Case(**SMALL, member="lora", bias=False), {}),
    "dropout-autocast": (Case(**SMALL, order="col_row"), {"dropout_p": 0.5, "training": True}),
    "only-x": (Case(**SMALL), {"trained": ("x",)}),
    "only-lora_B": (Case(**SMALL, member="lora"), {"trained": ("lora_B",)}),
    "only-magnitude_col": (Case(**SMALL), {"trained": ("magnitude_col",)}),
    "empty": (Case(0, 20, 24, 2), {}),
}


@backends
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(backend, name, device):
    case, options = CALLS[name]
    require(backend, case.dtype)
    options = {"scaling": 0.5, "norm_order": case.order, "backend": backend, **options}
    with Recorder() as recorder:
        run(bora_linear, case.inputs(device), case.upstream(device), **options)
    assert [operator.__name__ for operator, _ in recorder.calls] == ["forward.default", "backward.default"]
    for operator, arguments in recorder.calls:
        with torch.autocast(device, torch.bfloat16, enabled="autocast" in name):
            torch.library.opcheck(operator, arguments)


# ---- torch.compile ----


COMPILED = {
    "bora-row_col": (FusedBoraLinear, {}),
    "bora-col_row-nobias-autocast": (FusedBoraLinear, {"norm_order": "col_row", "bias": False}),
    "dora": (FusedDoraLinear, {}),
}


@backends
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_eager_for_any_batch(backend, name, device):
    """One graph each for the first batch size and for all others; the same bits as eager."""
    require(backend, torch.bfloat16)
    torch.compiler.reset()
    cls, options = COMPILED[name]
    module = make_module(backend, device, cls, **options)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for batch in ((5,), (7,), (2, 3), (2, 9), (4, 4)):
        x = torch.randn(*batch, 24, device=device)
        with torch.autocast(device, torch.bfloat16, enabled="autocast" in name):
            assert_equal(results_of(compiled, module, x), results_of(module, module, x))
    assert counter.frame_count <= 4  # two for each number of dimensions


def test_compiled_layers_of_several_scalings(device):
    """What differs between layers, or changes between calls, the compiler takes for a variable."""
    torch.compiler.reset()
    layers = torch.nn.Sequential(*(FusedBoraLinear(24, 24, r=2, alpha=alpha, device=device) for alpha in (1, 3, 5)))
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 24, device=device)
    for scaling in (0.25, 0.5, 2.0):
        for layer in layers:
            layer.scaling *= scaling
            torch.nn.init.normal_(layer.lora_B)
        assert_equal(results_of(compiled, layers, x), results_of(layers, layers, x))


@backends
def test_compiled_dropout_is_eager(backend, device):
    require(backend, torch.float32)
    torch.compiler.reset()
    module = make_module(backend, device, dropout=0.5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 24, device=device)
    results = []
    for call in (compiled, module):
        torch.manual_seed(3)
        results.append(results_of(call, module, x))
    assert_equal(*results)
    assert not torch.equal(results[0][0], results_of(module.eval(), module, x)[0])


@backends
@pytest.mark.parametrize("compiled_forward", [False, True], ids=["eager", "compiled"])
def test_compiled_autograd(backend, compiled_forward, device):
    """The compiler sees a backward as one operator, also that of an eager forward."""
    require(backend, torch.float32)
    torch.compiler.reset()
    module = make_module(backend, device)
    compile_whole = torch.compile(backend="aot_eager", fullgraph=True)
    call, x = compile_whole(module) if compiled_forward else module, torch.randn(2, 5, 24, device=device)
    expected = results_of(call, module, x)
    with torch._dynamo.compiled_autograd._enable(compile_whole):
        assert_equal(results_of(call, module, x), expected)


@pytest.mark.skipif(shutil.which("cc") is None, reason="inductor needs a C compiler")
def test_inductor(device, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # an older graph expects the scales in another size
    torch.compiler.reset()
    module = make_module(None, device)
    x = torch.randn(2, 5, 24, device=device)
    compiled = torch.compile(module, fullgraph=True)
    assert_equal(results_of(compiled, module, x), results_of(module, module, x))


# ---- autocast ----


@backends
@variants
def test_autocast_of_a_float32_layer(backend, member, order, device):
    """bfloat16 out, by the accuracy rule of bfloat16; gradients in the dtypes of the parameters."""
    case = Case(9, 37, 53, 3, dtype=torch.bfloat16, member=member, order=order)
    inputs = case.inputs(device)
    inputs["weight"] = torch.randn(37, 53, device=device) / 53**0.5
    inputs["bias"] = inputs["bias"].float()

    def autocast_layer(**arguments):
        with torch.autocast(device, torch.bfloat16):
            return bora_linear(**arguments)

    results = check_layer(backend, inputs, case.upstream(device), layer=autocast_layer, norm_order=order)
    wide = run(autocast_layer, inputs | {"x": inputs["x"].float()}, case.upstream(device),
               backend=backend, scaling=0.5, norm_order=order)  # fmt: skip
    assert wide["y"].dtype == torch.bfloat16 and wide["d_x"].dtype == torch.float32
    for name, value in wide.items():
        assert torch.equal(value, results[name].to(value.dtype)), name


# ---- checkpointing and determinism ----


@backends
@orders
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["nodrop", "dropout"])
def test_checkpointing_changes_no_bit(backend, order, reentrant, dropout, device):
    require(backend, torch.float32)
    module = make_module(backend, device, dropout=dropout, norm_order=order)
    x = torch.randn(5, 24, device=device)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x_leaf = x.clone().requires_grad_()
        y = checkpoint(module, x_leaf, use_reentrant=reentrant) if checkpointed else module(x_leaf)
        module.zero_grad()
        y.square().sum().backward()
        gradients = [p.grad for p in module.parameters() if p.requires_grad]
        results.append([y.detach(), x_leaf.grad, *gradients])
    assert_equal(*results)


@backends
@orders
def test_repeated_runs_give_the_same_bits(backend, order, device):
    case = Case(150, 40, 48, 3)
    require(backend, case.dtype)
    inputs, dy = case.inputs(device), case.upstream(device)
    options = {"scaling": 0.5, "norm_order": order, "backend": backend}
    first, second = (run(bora_linear, inputs, dy, **options) for _ in range(2))
    assert_equal(first.values(), second.values())


# ---- what is kept for backward ----


def saved_sizes(inputs, **options):
    """Elements and their size of what a forward keeps for backward, besides its inputs and its output."""
    leaves = {name: None if t is None else t.detach().requires_grad_(name != "weight") for name, t in inputs.items()}
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = bora_linear(**leaves, scaling=0.5, **options)
    free = {t.untyped_storage().data_ptr() for t in (*leaves.values(), y) if t is not None}
    kept = [t for t in packed if t.untyped_storage().data_ptr() not in free]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept)
    assert any(t.data_ptr() == inputs["weight"].data_ptr() for t in packed)
    return sorted((t.numel(), t.element_size()) for t in kept)


@backends
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("detach_norm", [False, True], ids=["exact", "detached"])
def test_saved_for_backward(backend, bias, detach_norm, device):
    """u; norms, scales and four numbers; two products of factor size for exact gradients; the product with a bias."""
    M, N, K, R = 7, 20, 24, 3
    case = Case(M, N, K, R, dtype=torch.bfloat16, bias=bias)
    require(backend, case.dtype)
    products = (N + K) * R if backend == "triton" and not detach_norm else 0
    expected = [(M * R, 4), (2 * (N + K) + products + 4, 4)]
    expected += [(M * N, 2)] if bias else []
    assert saved_sizes(case.inputs(device), backend=backend, detach_norm=detach_norm) == sorted(expected)


@backends
def test_saved_for_backward_by_lora_with_dropout(backend, device):
    M, N, K, R = 7, 20, 24, 3
    case = Case(M, N, K, R, dtype=torch.bfloat16, member="lora")
    require(backend, case.dtype)
    dropout = (1, 8) if backend == "triton" else (M * K, 1)
    saved = saved_sizes(case.inputs(device), backend=backend, dropout_p=0.5, training=True)
    assert saved == sorted([(M * R, 4), dropout])


# ---- in-place operations on the output ----


@backends
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)], ids=str)
def test_output_may_be_changed_in_place(backend, shape, device):
    """It is no view, whose history an in-place operation would rewrite; test_transforms has layers without a bias."""
    x = torch.randn(shape, device=device)
    module = make_module(backend, device)
    assert not module(x.requires_grad_())._is_view()
    assert_equal(results_of(lambda x: module(x).mul_(2), module, x), results_of(lambda x: module(x) * 2, module, x))
