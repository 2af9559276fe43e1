"""A layer over a sharded weight on plain tensors, merged, saved and misused."""

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers.distributed import launch
from helpers.sharded import STYLES, assert_same, styles, whole_and_sharded, x_and_dy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from benchmarks.collectives import Collectives
from bora_kernels import FusedBoraLinear, FusedDoraLinear, _private, bora_linear
from bora_kernels.distributed import BoraColwiseParallel, BoraRowwiseParallel

# ---- plain tensors ----


def part_of(tensor: torch.Tensor, placement) -> torch.Tensor:
    """This rank's part of a tensor that all have, or of a sum over the ranks."""
    if placement == Partial():
        return tensor / dist.get_world_size()
    if placement == Replicate():
        return tensor.clone()
    return tensor.tensor_split(uneven(tensor.shape[placement.dim]), placement.dim)[dist.get_rank()].clone()


def uneven(size: int) -> list[int]:
    """Where ``torch.chunk`` splits a dimension."""
    step = -(-size // dist.get_world_size())
    return [min(size, step * rank) for rank in range(1, dist.get_world_size())]


def check_parts(style: str) -> None:
    """Parts come in and go out, of any placement, of features that divide unevenly; so do their gradients."""
    x, dy = x_and_dy()
    outer_of = {"colwise": (Replicate(), Shard(0), Shard(1), Shard(-1))}
    outer_of["rowwise"] = (*outer_of["colwise"], Partial())  # y is a sum as it is made
    tokens = [Shard(dim) for dim in (0, 1) if x.shape[dim] % dist.get_world_size() == 0]
    inner_of = (Replicate(), *tokens, Shard(-1), Partial())
    for (inner, outer), transposed in zip(
        itertools.product(inner_of, outer_of[style]), itertools.cycle((False, True)), strict=False
    ):
        layouts = {"input_layouts": inner, "output_layouts": outer}
        options = {"bias": not transposed, "norm_order": "col_row" if transposed else "row_col"}
        whole_layer, sharded = whole_and_sharded(type(STYLES[style])(**layouts), **options)
        leaf = x.clone().requires_grad_()
        y = whole_layer(leaf)
        y.backward(dy)
        part = part_of(x, inner)
        if transposed:  # in memory
            part = part.transpose(0, 1).contiguous().transpose(0, 1)
        given = part.clone()
        y_part = sharded(part.requires_grad_())
        assert not isinstance(y_part, DTensor)
        gradient = part_of(dy, Replicate() if outer == Partial() else outer)
        y_part.backward(gradient.transpose(0, 1).contiguous().transpose(0, 1) if transposed else gradient)
        assert torch.equal(part, given)  # no message overwrites what came in
        if outer == Partial():
            dist.all_reduce(y_part := y_part.detach().clone())
        expected_y = y.detach() if outer == Partial() else part_of(y.detach(), outer)
        dx = leaf.grad if inner == Partial() else part_of(leaf.grad, inner)
        actual = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.requires_grad}
        expected = {name: p.grad for name, p in whole_layer.named_parameters() if p.requires_grad}
        assert_same(actual | {"x": part.grad, "y": y_part}, expected | {"x": dx, "y": expected_y})


@pytest.mark.sampled(2)
@styles
@pytest.mark.parametrize("ranks", [2, 3])
def test_plain_parts_of_any_placement(style, ranks):
    launch(check_parts, ranks, style)


def check_nodes(style: str) -> None:
    _, layer = whole_and_sharded(STYLES[style], 40, 28)
    x = torch.randn(2, 5, 28, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    parents = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert y.grad_fn.name() == "ShardedBoraLinearFunctionBackward"
    assert sorted({node.name() for node in parents}) == ["_LocalPartsBackward", "torch::autograd::AccumulateGrad"]


@styles
def test_layer_is_one_step_of_autograd_from_plain_x_to_plain_y(style):
    launch(check_nodes, 2, style)


# ---- merge, checkpoints ----


def check_merge(style: str) -> None:
    x, _ = x_and_dy()
    for options in ({}, {"norm_order": "col_row"}, {"layer": FusedDoraLinear}):
        whole_layer, sharded = whole_and_sharded(STYLES[style], **options)
        weight = sharded.effective_weight()
        assert weight.placements == sharded.weight.placements
        sharded.merge()
        with Collectives() as collectives:
            y = sharded(x)
        assert all(size <= 24 * 42 for _, size in collectives.seen)  # of y, padded, and not of the weight
        whole_layer.backend = None
        assert_same(
            {"weight": weight.full_tensor(), "y": y}, {"weight": whole_layer.effective_weight(), "y": whole_layer(x)}
        )


@styles
def test_merged_layer_runs_on_shards(style):
    launch(check_merge, 2, style)


def check_rounding(style: str) -> None:
    layers = whole_layer, sharded = whole_and_sharded(STYLES[style])
    for layer in layers:
        layer.weight = torch.nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)
    different = sharded.effective_weight().full_tensor() != whole_layer.effective_weight()
    assert different.float().mean() < 0.01  # norms that differ in float32's last places move a few
    sharded.reset_parameters()
    assert torch.equal(sharded.effective_weight().full_tensor(), whole_layer.weight)


@pytest.mark.parametrize("ranks", [2, 3])
@styles
def test_merged_weight_is_rounded_on_shards_as_in_the_whole(style, ranks):
    launch(check_rounding, ranks, style)


# ---- gradients ----


def check_gradients(style: str, lacks: bool) -> None:
    if lacks:  # a version whose DTensors keep their parts elsewhere
        _private.of_dtensor = lambda *_: None
    x, _ = x_and_dy()  # 41 outputs and 27 inputs: no number of ranks divides them
    _, layer = whole_and_sharded(STYLES[style])
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    layer(x).sum().backward()
    first = [p.grad.full_tensor().clone() for p in trained.values()]
    for name, parameter in trained.items():
        gradient = parameter.grad
        assert not gradient.requires_grad
        for got, expected in (gradient, parameter), (gradient.to_local(), parameter.to_local()):
            assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype), name
        assert gradient.placements == parameter.placements
    layer(x).sum().backward()  # added to the first
    for before, parameter in zip(first, trained.values(), strict=True):
        assert torch.equal(parameter.grad.full_tensor(), 2 * before)
    graphed = torch.autograd.grad(layer(x).sum(), tuple(trained.values()), create_graph=True)
    for gradient, before in zip(graphed, first, strict=True):
        assert torch.equal(gradient.full_tensor(), before)
    with pytest.raises(RuntimeError, match='no second derivative: backend="reference" has'):
        torch.autograd.grad(sum(g.to_local().square().sum() for g in graphed), trained["lora_B"])


@styles
@pytest.mark.parametrize("lacks", [False, True], ids=["", "without private parts of DTensor"])
def test_gradients_are_placed_and_laid_out_as_parameters(style, lacks):
    launch(check_gradients, 2, style, lacks)


# ---- errors ----


def check_errors() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = FusedBoraLinear(8, 6, 2)
    for style in (BoraColwiseParallel(), BoraRowwiseParallel()):
        with pytest.raises(TypeError, match="module must be a FusedBoraLinear, got Linear"):
            parallelize_module(torch.nn.Linear(8, 6), mesh, style)
    layer.merge()
    with pytest.raises(ValueError, match="module must not be merged"):
        parallelize_module(layer, mesh, BoraColwiseParallel())
    layer.unmerge()
    with pytest.raises(TypeError, match="input_layouts must be a Placement or None, got str"):
        BoraColwiseParallel(input_layouts="replicate")
    parallelize_module(layer, mesh, BoraRowwiseParallel())
    local_width = layer.lora_A.to_local().shape[1]
    for x, message in (
        (torch.randn(3, 8), rf"x must be \[..., {local_width}\] for .* of 8 in_features, got \[3, 8\]"),
        (torch.tensor(1.0), r"x must be .* got \[\]"),
        (distribute_tensor(torch.randn(3, 5), mesh, [Replicate()]), r"x must be \[..., 8\] for weight \[6, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x)
    layer.backend = "reference"
    with pytest.raises(ValueError, match='backend must be "triton", "torch" or None for a sharded weight'):
        layer(torch.randn(3, local_width))
    layer.backend = None
    names = ("weight", "lora_A", "lora_B", "magnitude_row", "magnitude_col", "bias")
    arguments = {name: getattr(layer, name) for name in names}
    x = distribute_tensor(torch.randn(3, 8), mesh, [Replicate()])
    for name, wrong, message in (
        ("x", torch.randn(3, 8), "x must be a DTensor on the mesh of weight, got Tensor"),
        ("lora_B", torch.randn(6, 2), "lora_B must be Replicate.* got a plain tensor"),
        ("lora_A", distribute_tensor(torch.randn(2, 8), mesh, [Replicate()]), "lora_A must be .*Shard.*dim=1"),
        ("weight", distribute_tensor(torch.randn(6, 8), mesh, [Replicate()]), "weight must be .* not once, by"),
    ):
        with pytest.raises(TypeError, match=message):
            bora_linear(**({"x": x} | arguments | {name: wrong}), scaling=1.0)


def test_misuse_is_refused_by_name():
    launch(check_errors, 2)


def check_errors_of_known_calls() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = parallelize_module(FusedBoraLinear(8, 6, 2), mesh, BoraColwiseParallel())
    x = torch.randn(3, 8)
    y = layer(x)  # a good call, after which others that differ in one thing are to be looked at anew
    names = ("weight", "lora_A", "lora_B", "magnitude_row", "magnitude_col", "bias")
    arguments = {"x": x} | {name: getattr(layer, name) for name in names} | {"scaling": layer.scaling}
    arguments |= {"placements": (Replicate(), Shard(-1))}
    assert torch.equal(bora_linear(**arguments), y)
    trained = torch.nn.Parameter(layer.weight.detach().clone())
    for name, wrong, kind, message in (
        ("x", x[:, 1:], ValueError, r"x must be \[..., 8\] for R.* of 8 in_features, got \[3, 7\]"),
        ("x", x.double(), TypeError, "x must have weight's dtype torch.float32"),
        ("x", None, TypeError, "x must be a Tensor, got NoneType"),
        ("weight", trained, ValueError, "weight must be frozen"),
        ("lora_B", distribute_tensor(torch.randn(6, 2), mesh, [Replicate()]), TypeError, "lora_B must be Shard"),
        ("lora_B", layer.lora_B.to_local(), TypeError, "lora_B must be .* got a plain tensor"),
        ("magnitude_col", distribute_tensor(torch.ones(7), mesh, [Replicate()]), ValueError, "magnitude_col must be"),
        ("backend", "reference", ValueError, 'backend must be "triton", "torch" or None'),
        ("placements", (Replicate(), "shard"), TypeError, "placements must be two, of x and of y"),
        ("placements", (Replicate(),), TypeError, "placements must be two, of x and of y"),
    ):
        with Collectives() as collectives, pytest.raises(kind, match=message):
            bora_linear(**(arguments | {name: wrong}))
        assert not collectives.seen
    assert torch.equal(bora_linear(**arguments | {"placements": [Replicate(), Shard(1)]}), y)


def test_calls_that_differ_from_a_known_one_are_checked():
    launch(check_errors_of_known_calls, 2)
