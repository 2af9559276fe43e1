"""One layer over a sharded weight: what it computes and what it sends."""

import copy
import functools
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import INTERPRETING
from helpers.accuracy import assert_accurate
from helpers.cases import NAMES, TRAINED, VARIANTS, Case, check_layer, require, run
from helpers.distributed import launch
from helpers.interpreter import interpreter_problem
from helpers.sharded import PLACEMENTS, STYLES, assert_same, sharded_layer, styles, whole_and_sharded, x_and_dy
from helpers.training import gathered
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from benchmarks import communication
from benchmarks.collectives import Collectives
from bora_kernels import FusedBoraLinear, FusedDoraLinear, reuse_scales
from bora_kernels.reference import bora_linear_ref

# ---- the layer ----

pytestmark = pytest.mark.sampled(2)
LAYERS = {
    f"{by}-{case}-{'detached' if detach_norm else 'exact'}-{backend}": (by, case, detach_norm, backend, 1.0)
    for by in PLACEMENTS
    for detach_norm in (False, True)
    for backend, dtypes in (("torch", NAMES), ("triton", (torch.float32, torch.bfloat16) if INTERPRETING else ()))
    for dtype in dtypes
    if not detach_norm or dtype == torch.float64
    for case in (Case(5, 41, 27, 3, dtype=dtype, member=member, order=order) for member, order in VARIANTS)
}
LAYERS |= {
    f"{by}-{case}-exact-torch": (by, case, False, "torch", 1.0)
    for by in PLACEMENTS
    for case in (
        Case(4, 1, 9, 2, dtype=torch.float64, order="col_row"),  # a rank without rows
        Case(4, 9, 1, 2, dtype=torch.float64),  # and one without columns
        Case(6, 3, 3, 8),
        Case(0, 8, 8, 2),
    )
}
LAYERS |= {  # a factor of the first magnitude, which is free, is not to leave float16's range
    f"{by}-{case}-times-{factor}-{backend}": (by, case, False, backend, factor)
    for by in PLACEMENTS
    for backend, factors in (("torch", (1e-5, 300.0, 1e4)), ("triton", (1e4,)))
    for factor in factors
    for case in (Case(9, 43, 70, 3, dtype=torch.float16, order=order) for order in ("row_col", "col_row"))
}
LAYERS["columns-short"] = ("columns", Case(9, 40, 33, 3, dtype=torch.float16), False, "torch", 1e4)  # 17 columns and 16


def check_layers(layers: dict[str, tuple], device: str = "cpu") -> dict[str, str]:
    """What is wrong with each layer, for those with which something is."""
    # fills fresh memory with NaN; cuBLAS would refuse without an environment variable that changes what it runs
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    failures = {}
    for name, (by, case, detach_norm, backend, factor) in layers.items():
        layer = functools.partial(sharded_layer, mesh, PLACEMENTS[by])
        options = {"layer": layer, "norm_order": case.order, "detach_norm": detach_norm}
        inputs, first = case.inputs(device), f"magnitude_{case.order[:3]}"
        if factor != 1.0:
            inputs[first] = inputs[first] * factor
        try:
            check_layer(backend, inputs, case.upstream(device), **options)
        except AssertionError as error:
            failures[name] = str(error)
        except pytest.skip.Exception:
            continue  # the test of this layer skips, for the same reason
    return failures


def problem(backend: str) -> str | None:
    """Why ranks without a GPU, whose kernels are interpreted wherever the test runs, cannot run a backend."""
    return interpreter_problem() if backend == "triton" else None


@functools.cache
def failures() -> list[dict[str, str]]:
    return launch(check_layers, 2, {name: layer for name, layer in LAYERS.items() if not problem(layer[3])})


@pytest.mark.parametrize("name", LAYERS)
def test_layer_obeys_the_accuracy_rule(name):
    _, case, _, backend, _ = LAYERS[name]
    require(backend, case.dtype)
    if reason := problem(backend):
        pytest.skip(reason)
    for failures_of_rank in failures():
        assert name not in failures_of_rank, failures_of_rank[name]


# ---- layouts ----


def check_layouts(style: str, device: str = "cpu") -> None:
    """Any layout of a DTensor that comes in, and any that is asked for, with gradients to match."""
    x, dy = (tensor.to(device) for tensor in x_and_dy())
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    placements = (Replicate(), Shard(0), Shard(1), Shard(-1))
    for inner, outer in itertools.product((*placements, Partial()), placements):
        kind = type(STYLES[style])
        whole_layer, sharded = whole_and_sharded(kind(output_layouts=outer, use_local_output=False), device=device)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        y = whole_layer(leaves[0])
        y.backward(dy)
        if inner == Partial():
            x_sharded = DTensor.from_local(leaves[1] / dist.get_world_size(), mesh, [inner])
        else:
            x_sharded = DTensor.from_local(leaves[1], mesh, [Replicate()]).redistribute(placements=[inner])
        given = x_sharded.to_local().clone()
        y_sharded = sharded(x_sharded)
        assert y_sharded.placements == (outer if outer != Shard(-1) else Shard(2),)
        y_sharded.backward(distribute_tensor(dy, mesh, [outer]))
        assert torch.equal(x_sharded.to_local(), given)  # no message overwrites what came in
        actual = {name: gathered(p.grad) for name, p in sharded.named_parameters() if p.requires_grad}
        expected = {name: p.grad for name, p in whole_layer.named_parameters() if p.requires_grad}
        dx = leaves[1].grad * (dist.get_world_size() if inner == Partial() else 1)
        assert_same(actual | {"x": dx, "y": y_sharded.full_tensor()}, expected | {"x": leaves[0].grad, "y": y})


@styles
def test_any_layout_of_input_and_output(style):
    launch(check_layouts, 2, style)


def check_autocast() -> None:
    x, dy = (t.float() for t in x_and_dy())
    for style in STYLES.values():
        torch.manual_seed(3)
        bare = FusedBoraLinear(27, 41, 3)
        sharded = parallelize_module(copy.deepcopy(bare), init_device_mesh("cpu", (dist.get_world_size(),)), style)
        results = {}
        for name, layer in {"bare": bare, "sharded": sharded, "float32": bare}.items():
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=name != "float32"):
                y = layer(leaf)
            y.backward(dy.to(y.dtype))
            results[name] = {"y": y.detach(), "dx": leaf.grad}
        exact = {name: t.double() for name, t in results["float32"].items()}
        plain = {name: t.to(results["bare"][name].dtype) for name, t in results["bare"].items()}
        assert_accurate(results["sharded"], plain, exact, samples=24)


def test_autocast_computes_in_its_dtype():
    launch(check_autocast, 2)


# ---- dropout ----


def gradients(layer, x, dy) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(layer(x), list(parameters.values()), dy)
    return {name: gathered(gradient) for name, gradient in zip(parameters, found, strict=True)}


def check_dropout(style: str) -> None:
    torch.manual_seed(dist.get_rank())  # ranks that agree on nothing
    seed = int(torch.randint(0, 2**31 - 1, (1,))) if dist.get_rank() == 0 else None
    seeds = [seed]
    dist.broadcast_object_list(seeds, src=0)
    x, dy = x_and_dy()
    K = x.shape[-1]
    widths = [K] if style == "colwise" else [len(part) for part in torch.arange(K).chunk(dist.get_world_size())]
    masks = [
        torch.rand(24, width, generator=torch.Generator().manual_seed(seeds[0] + i)) >= 0.25
        for i, width in enumerate(widths)
    ]
    mask = torch.cat(masks, dim=1).view(x.shape)
    whole_layer, sharded = whole_and_sharded(STYLES[style], dropout=0.25)
    arguments = {name: getattr(whole_layer, name).detach() for name in TRAINED[1:]} | {"weight": whole_layer.weight}
    exact = run(
        bora_linear_ref, {"x": x} | arguments, dy,
        trained=TRAINED[1:5], scaling=whole_layer.scaling, dropout_p=0.25, dropout_mask=mask,
    )  # fmt: skip
    torch.manual_seed(dist.get_rank())
    assert_same(
        {f"d_{name}": gradient for name, gradient in gradients(sharded, x, dy).items()},
        {name: value for name, value in exact.items() if name != "y"},
    )


@styles
def test_dropout_drops_the_same_of_a_replicated_input_and_draws_for_each_shard_of_another(style):
    launch(check_dropout, 2, style)


# ---- messages ----

NAMES_OF_COLLECTIVES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}


def check_messages() -> None:
    """A step sends what the cost model says, in its order, and nothing of the weight's size."""
    M, N, K, R = 4, 96, 64, 3
    members = {"bora": FusedBoraLinear, "dora": FusedDoraLinear}
    for style, method, order, detach_norm, sequence in itertools.product(
        ("colwise", "rowwise"), members, ("row_col", "col_row"), (False, True), (False, True)
    ):
        tokens = Shard(0) if sequence else Replicate()
        options = {"input_layouts": tokens} if style == "colwise" else {"output_layouts": tokens}
        _, layer = whole_and_sharded(
            type(STYLES[style])(**options), N, K, R, layer=members[method], norm_order=order, detach_norm=detach_norm
        )
        size = dist.get_world_size()
        whole_input = style == "colwise" and not sequence
        x = torch.randn(M if style == "rowwise" or whole_input else M // size, K if style == "colwise" else K // size)
        with Collectives() as collectives:
            layer(x.double().requires_grad_()).sum().backward()
        expected = communication.messages(
            style, M, N, K, R, method=method, detach_norm=detach_norm, sequence=sequence, itemsize=8
        )
        case = (style, method, order, detach_norm, sequence)
        seen = [(NAMES_OF_COLLECTIVES[name], size) for name, size in collectives.seen]
        assert seen == [(message.collective, message.elements) for message in expected], case
        assert collectives.bytes == sum(8 * message.elements for message in expected)
        assert max(size for _, size in seen) < N * K / 4


def test_messages_are_those_of_the_cost_model():
    launch(check_messages, 2)


def test_tables_of_the_cost_model_are_its_output(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["communication"])
    communication.main()
    document = (Path(__file__).parents[3] / "docs" / "cost_model.md").read_text(encoding="utf-8")
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in document


def check_reuse(style: str) -> None:
    x, dy = x_and_dy()
    _, layer = whole_and_sharded(STYLES[style])
    norms = ("allreduce", layer.in_features if style == "colwise" else layer.out_features)

    def step() -> tuple[dict[str, torch.Tensor], int]:
        layer.zero_grad()
        with Collectives() as forward:
            y = checkpoint(layer, x, use_reentrant=False)
        with Collectives() as backward:
            y.backward(dy)
        grads = {name: gathered(p.grad) for name, p in layer.named_parameters() if p.requires_grad}
        return grads, (forward.seen + backward.seen).count(norms) - 1  # one is S or D

    optimizer = torch.optim.SGD(
        [p for p in layer.parameters() if p.requires_grad], lr=0.1, foreach=True
    )  # bumps no version
    expected, count = step()
    assert count == 1  # in forward; the recomputation of the checkpoint finds it
    with reuse_scales():
        for count in (1, 0):
            actual, seen = step()
            assert seen == count
            assert_same(actual, expected)
        for change in (optimizer.step, lambda: layer.magnitude_row.mul_(1.5)):
            with torch.no_grad():
                change()
            changed, seen = step()
            assert seen == 1
    again, seen = step()
    assert seen == 1
    assert_same(changed, again)


@styles
def test_norms_are_reduced_once_within_reuse_scales(style):
    launch(check_reuse, 2, style)
