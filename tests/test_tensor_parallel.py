"""Tensor parallelism: layers sharded over ranks compute what one process does, with the messages that were derived."""

import copy
import functools
import itertools
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_accurate
from cases import NAMES, SCALING, TRAINED, VARIANTS, Case, check_layer, run
from distributed import Collectives, RankErrors, launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint
from training import RANK, STEPS, WIDTH, Run, gathered, train

from benchmarks.communication import messages
from bora_kernels import FusedBoraLinear, FusedDoraLinear, bora_linear
from bora_kernels.distributed import BoraColwiseParallel, BoraRowwiseParallel, reuse_norms
from bora_kernels.distributed.layout import BY_COLUMNS, BY_ROWS
from bora_kernels.reference import bora_linear_ref

# ---- training ----

RUNS = [
    Run("tp", order, detach_norm, checkpointing, sequence=detach_norm != bool(checkpointing))
    for order in ("row_col", "col_row")
    for detach_norm in (False, True)
    for checkpointing in ("", "inside")
]
RUNS += [Run("tp", dora=True), Run("tp", dora=True, detach_norm=True, sequence=True), Run("tp", micro_batches=2)]
RUNS_ON = {
    2: RUNS + [Run("tp", order, precision="bf16_base") for order in ("row_col", "col_row")],
    4: RUNS[1::3]
    + [replace(run, strategy="fsdp_tp") for run in RUNS]
    + [Run("fsdp_tp", order, precision="bf16_policy") for order in ("row_col", "col_row")],
}


@functools.cache
def single(run: Run, exact: bool) -> dict:
    return train(run, exact=exact)


@functools.cache
def trained_by(world_size: int) -> dict:
    """What each rank got for each of the runs: {run: [rank's results]}."""
    runs = RUNS_ON[world_size]
    return dict(zip(runs, zip(*launch(train_all, world_size, runs, timeout=120), strict=True), strict=True))


def train_all(runs: list[Run]) -> list[dict]:
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    return [train(run) for run in runs]


def assert_as_on_one_process(actual: dict, run: Run) -> None:
    """By the accuracy rule: "plain" is the layer on one process, "exact" the dense reference in float64."""
    one = Run(order=run.order, detach_norm=run.detach_norm, dora=run.dora, precision=run.precision)
    triple = actual, single(one, exact=False), single(one, exact=True)
    for names, samples in (({"loss"}, STEPS), (actual.keys() - {"loss"}, RANK * WIDTH)):
        assert_accurate(*({name: results[name] for name in names} for results in triple), samples=samples)


@pytest.mark.parametrize(
    "world_size, run",
    [(world_size, run) for world_size, runs in RUNS_ON.items() for run in runs],
    ids=lambda value: str(value) if isinstance(value, Run) else f"{value}ranks",
)
def test_five_steps_equal_those_of_one_process(world_size, run):
    first, *others = trained_by(world_size)[run]
    assert_as_on_one_process(first, run)
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())


# ---- the layer ----

PLACEMENTS = {"rows": BY_ROWS, "columns": BY_COLUMNS}
LAYERS = {
    f"{by}-{case}-{'detached' if detach_norm else 'exact'}-{backend}": (by, case, detach_norm, backend)
    for by in PLACEMENTS
    for detach_norm in (False, True)
    for backend, dtypes in (("torch", NAMES), ("triton", (torch.float32, torch.bfloat16)))
    for dtype in dtypes
    for case in (Case(5, 41, 27, 3, dtype=dtype, member=member, order=order) for member, order in VARIANTS)
}
LAYERS |= {
    f"{by}-{case}-exact-torch": (by, case, False, "torch")
    for by in PLACEMENTS
    for case in (
        Case(4, 1, 9, 2, dtype=torch.float64, order="col_row"),  # a rank without rows
        Case(4, 9, 1, 2, dtype=torch.float64),  # and one without columns
        Case(6, 3, 3, 8),
        Case(0, 8, 8, 2),
    )
}


def check_layers(names: list[str]) -> dict[str, str]:
    """What is wrong with each layer, for those with which something is."""
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    failures = {}
    for name in names:
        by, case, detach_norm, backend = LAYERS[name]
        layer = functools.partial(sharded_layer, mesh, PLACEMENTS[by])
        options = {"layer": layer, "norm_order": case.order, "detach_norm": detach_norm}
        try:
            check_layer(backend, case.inputs("cpu"), case.upstream("cpu"), **options)
        except AssertionError as error:
            failures[name] = str(error)
    return failures


def sharded_layer(mesh, placements, x, *, x_placement=None, **arguments):
    """``bora_linear`` of whole tensors by way of their shards, differentiable."""

    def shard(tensor, placement):
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False).redistribute(placements=[placement])

    x = shard(x, x_placement or Replicate())
    sharded = {name: shard(t, placements[name]) for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    return bora_linear(x, **(arguments | sharded)).redistribute(placements=[Replicate()]).to_local()


@functools.cache
def failures() -> list[dict[str, str]]:
    return launch(check_layers, 2, list(LAYERS))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_obeys_the_accuracy_rule(name):
    for failures_of_rank in failures():
        assert name not in failures_of_rank, failures_of_rank[name]


def whole_and_sharded(style, N=41, K=27, R=3, **options) -> tuple[FusedBoraLinear, FusedBoraLinear]:
    """The same float64 layer twice, once shared by all ranks."""
    layer = options.pop("layer", FusedBoraLinear)
    torch.manual_seed(3)
    whole = layer(K, N, R, dtype=torch.float64, adapter_dtype=torch.float64, **options)
    torch.nn.init.normal_(whole.lora_B)
    sharded = copy.deepcopy(whole)
    parallelize_module(sharded, init_device_mesh("cpu", (dist.get_world_size(),)), style)
    whole.backend = "reference"
    return whole, sharded


def gradients(layer, x, dy) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(layer(x), list(parameters.values()), dy)
    return {name: gathered(gradient) for name, gradient in zip(parameters, found, strict=True)}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11 * value.abs().max().item(), msg=name)


@functools.cache
def x_and_dy(N=41, K=27) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(4, 6, size, generator=generator, dtype=torch.float64) for size in (K, N))


STYLES = {
    "colwise": BoraColwiseParallel(output_layouts=Replicate()),
    "rowwise": BoraRowwiseParallel(input_layouts=Replicate()),
}  # whole tensors in and out
styles = pytest.mark.parametrize("style", STYLES)


# ---- layouts ----


def check_layouts(style: str) -> None:
    """Any layout of a DTensor that comes in, and any that is asked for, with gradients to match."""
    x, dy = x_and_dy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = (Replicate(), Shard(0), Shard(1), Shard(-1))
    for inner, outer in itertools.product((*placements, Partial()), placements):
        kind = type(STYLES[style])
        whole_layer, sharded = whole_and_sharded(kind(output_layouts=outer, use_local_output=False))
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        y = whole_layer(leaves[0])
        y.backward(dy)
        if inner == Partial():
            x_sharded = DTensor.from_local(leaves[1] / dist.get_world_size(), mesh, [inner])
        else:
            x_sharded = DTensor.from_local(leaves[1], mesh, [Replicate()]).redistribute(placements=[inner])
        y_sharded = sharded(x_sharded)
        assert y_sharded.placements == (outer if outer != Shard(-1) else Shard(2),)
        y_sharded.backward(distribute_tensor(dy, mesh, [outer]))
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
        expected = messages(style, M, N, K, R, method=method, detach_norm=detach_norm, sequence=sequence, itemsize=8)
        case = (style, method, order, detach_norm, sequence)
        seen = [(NAMES_OF_COLLECTIVES[name], size) for name, size in collectives.seen]
        assert seen == [(message.collective, message.elements) for message in expected], case
        assert collectives.bytes == sum(8 * message.elements for message in expected)
        assert max(size for _, size in seen) < N * K / 4


def test_messages_are_those_of_the_cost_model():
    launch(check_messages, 2)


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

    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    expected, count = step()
    assert count == 2  # forward, and again in backward
    with reuse_norms():
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
    assert seen == 2
    assert_same(changed, again)


@styles
def test_norms_are_reduced_once_within_reuse_norms(style):
    launch(check_reuse, 2, style)


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


def train_on(run: Run, steps: range, resume: str | None, save: str | None) -> dict:
    return train(run, steps=steps, resume=resume, save=save)


@pytest.mark.parametrize("path", [("tp2", "single", "fsdp_tp4"), ("fsdp4", "tp4", "tp2")], ids="-".join)
def test_training_goes_on_from_a_checkpoint_in_another_layout(path, tmp_path):
    parts = []
    for i, (place, steps) in enumerate(zip(path, (range(0, 2), range(2, 3), range(3, 5)), strict=True)):
        run = Run(place.rstrip("24"))
        arguments = (run, steps, str(tmp_path / f"{i}") if i else None, str(tmp_path / f"{i + 1}"))
        parts.append(train_on(*arguments) if place == "single" else launch(train_on, int(place[-1]), *arguments)[0])
    joined = {
        name: torch.cat([part[name] for part in parts]) if name == "loss" or name.startswith("d_") else value
        for name, value in parts[-1].items()
    }
    assert_as_on_one_process(joined, Run())


# ---- failures ----


def fail_on_rank_1(style: str) -> None:
    _, layer = whole_and_sharded(STYLES[style])
    x, dy = x_and_dy()
    for step in range(2):
        layer(x[..., 1:] if (step, dist.get_rank()) == (1, 1) else x).backward(dy)


@styles
def test_rank_that_raises_ends_the_job_with_its_error(style):
    start = time.monotonic()
    with pytest.raises(RankErrors) as caught:
        launch(fail_on_rank_1, 2, style)
    assert "ValueError: x must be [..., 27]" in caught.value.errors[1]
    assert "Connection" in caught.value.errors[0]
    assert time.monotonic() - start < 30


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


# ---- one rank ----


def check_one_rank(device: str, dtype: torch.dtype, N: int, K: int, M: int) -> None:
    """A group of one adds nothing: the same operators, so the same bits."""
    case = Case(M, N, K, 16, dtype=dtype)
    mesh = init_device_mesh(device, (1,))
    for placements in PLACEMENTS.values():
        bare, sharded = (
            run(layer, case.inputs(device), case.upstream(device), scaling=SCALING)
            for layer in (bora_linear, functools.partial(sharded_layer, mesh, placements))
        )
        for name, value in bare.items():
            assert torch.equal(sharded[name], value), name


def test_one_rank_computes_the_same_bits():
    launch(check_one_rank, 1, "cpu", torch.float32, 41, 27, 5)


@pytest.mark.gpu
def test_one_rank_computes_the_same_bits_over_nccl():
    launch(check_one_rank, 1, "cuda", torch.bfloat16, 4096, 4096, 2048, backend="nccl")


def time_one_rank() -> dict[str, float]:
    """Milliseconds of forward and backward of a large layer: bare, and tensor parallel on a mesh of one device."""
    from triton.testing import do_bench

    mesh = init_device_mesh("cuda", (1,))
    layers = {"bare": FusedBoraLinear(4096, 14336, dtype=torch.bfloat16, device="cuda")}
    for name, style in (("colwise", BoraColwiseParallel()), ("rowwise", BoraRowwiseParallel())):
        layers[name] = parallelize_module(copy.deepcopy(layers["bare"]), mesh, style)
    x = torch.randn(8192, 4096, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    dy = torch.randn(8192, 14336, dtype=torch.bfloat16, device="cuda")
    rounds = [
        {name: do_bench(lambda layer=layer: layer(x).backward(dy)) for name, layer in layers.items()} for _ in range(5)
    ]
    return {name: min(round[name] for round in rounds) for name in layers}


@pytest.mark.gpu
def test_one_rank_costs_at_most_3_percent():
    (times,) = launch(time_one_rank, 1, backend="nccl")
    assert max(times["colwise"], times["rowwise"]) <= 1.03 * times["bare"], times
