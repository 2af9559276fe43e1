"""Mixed batches against each adapter alone: values, dtypes, sizes, orders of the batch, what a batch may not be."""

import pytest
import torch
from conftest import HAS_TRITON, INTERPRETING
from helpers.accuracy import assert_accurate
from helpers.cases import HALVES, NAMES, Case, backends, dtypes, require

from bora_kernels import AdapterBank, bora_linear, bora_linear_mixed
from bora_kernels.reference import bora_linear_mixed_ref

# member, order of norms, rank, scaling
FAMILY = {
    "bora": ("bora", "row_col", 3, 0.5),
    "turned": ("bora", "col_row", 5, 2.0),
    "dora": ("dora", "row_col", 1, 1.0),
    "columns": ("columns", "row_col", 4, 0.25),
    "lora": ("lora", "row_col", 2, 1.5),
}
NAMES_IN_ORDER = (None, *FAMILY, "none")


def family(M: int, N: int, K: int, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """x, weight and bias, and the keyword arguments of each adapter of the family over that weight."""
    layer, adapters = {}, {}
    for seed, (name, (member, order, rank, scaling)) in enumerate(FAMILY.items()):
        inputs = Case(M, N, K, rank, dtype, member, order, seed=seed).inputs(device)
        tensors = {key: inputs.pop(key) for key in ("lora_A", "lora_B", "magnitude_row", "magnitude_col")}
        layer = layer or {key: inputs[key] for key in ("x", "weight", "bias")}
        norms = {"magnitude_row": layer["weight"].norm(dim=1), "magnitude_col": layer["weight"].norm(dim=0)}
        for key, norm in norms.items():  # trained over the first adapter's weight
            if tensors[key] is not None:
                tensors[key] = norm.to(tensors[key].dtype) * (1 + 0.1 * torch.randn_like(tensors[key]))
        adapters[name] = {**tensors, "scaling": scaling, "norm_order": order}
    return layer, adapters


def bank_of(weight: torch.Tensor, adapters: dict, **options) -> AdapterBank:
    bank = AdapterBank(weight, **options)
    for name, adapter in adapters.items():
        tensors = [adapter[key] for key in ("lora_A", "lora_B", "magnitude_row", "magnitude_col")]
        bank.add(name, tensors, scaling=adapter["scaling"], norm_order=adapter["norm_order"])
    bank.add("none", None)
    return bank


def wide(adapters: dict, dtype: torch.dtype) -> list[dict | None]:
    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    known = [{key: cast(value) for key, value in adapter.items()} for adapter in adapters.values()]
    return [None, *known, None]


def check(
    backend: str, batch: list[int], N: int, K: int, dtype: torch.dtype, device: str, tokens=1, factors=None
) -> None:
    """A batch, by the numbers of NAMES_IN_ORDER, and every adapter of it alone, held to the accuracy rule."""
    require(backend, dtype)
    entries = len(batch)
    layer, adapters = family(entries * tokens, N, K, dtype, device)
    x, weight, bias = layer["x"].view(entries, tokens, K), layer["weight"], layer["bias"]
    bank = bank_of(weight, adapters, dtype=factors)
    index = bank.index([NAMES_IN_ORDER[number] for number in batch])
    y = bora_linear_mixed(x, weight, bank, index, bias, backend=backend)
    numbers = torch.tensor(batch, device=device)[:, None].expand(entries, tokens)
    plain = bora_linear_mixed_ref(x, weight, wide(adapters, torch.float32), numbers, bias)
    double = [t.double() for t in (x, weight, bias)]
    exact = bora_linear_mixed_ref(*double[:2], wide(adapters, torch.float64), numbers, double[2])
    for number in set(batch):
        mine = numbers == number
        assert_accurate(
            {"y": y[mine]}, {"y": plain[mine].to(dtype)}, {"y": exact[mine]}, samples=int(mine.sum()) * min(N, K)
        )


@backends
@dtypes
@pytest.mark.parametrize(
    "batch, tokens",
    [([3, 1, 0, 5, 6, 4, 2, 1], 1), ([2, 5, 1], 5), ([4] * 7, 1), ([0, 0, 6], 2), ([6, 5, 4, 3, 2, 1, 0, 3], 18)],
    ids=["each", "sequences", "one-adapter", "base-alone", "many-tokens"],
)
def test_every_adapter_of_a_batch_is_as_right_as_it_is_alone(backend, dtype, batch, tokens, device):
    check(backend, batch, 53, 70, dtype, device, tokens)


@backends
@pytest.mark.parametrize("N, K", [(1, 1), (3, 40), (40, 7), (17, 513), (130, 17), (64, 64)])
def test_any_sizes_of_the_weight(backend, N, K, device):
    check(backend, [1, 2, 0, 4], N, K, torch.float32, device)
    check(backend, [5, 3, 3], N, K, torch.bfloat16, device, tokens=2)


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize("factors", [torch.float32, torch.float16], ids=NAMES.get)
def test_factors_in_a_dtype_of_their_own(dtype, factors, device):
    for batch, tokens in (([1, 2, 3], 1), ([1, 2, 3], 50)):
        check("triton", batch, 40, 70, dtype, device, tokens, factors)


def test_float64_on_pytorch_operations(device):
    check("torch", [1, 0, 5, 2], 23, 31, torch.float64, device, tokens=3)


@backends
@pytest.mark.parametrize("tokens", [1, 50], ids=["few", "many"])
def test_a_result_depends_neither_on_the_others_nor_on_the_order_of_the_bank(backend, tokens, device):
    """The same bits whoever else is in the batch, and whatever the slots are."""
    require(backend, torch.bfloat16)
    layer, adapters = family(3 * tokens, 40, 70, torch.bfloat16, device)
    x, weight = layer["x"].view(3, tokens, 70), layer["weight"]
    bank, turned = bank_of(weight, adapters), bank_of(weight, dict(reversed(adapters.items())))
    first = bora_linear_mixed(x, weight, bank, bank.index(["bora", "dora", "lora"]), backend=backend)
    again = bora_linear_mixed(x, weight, turned, turned.index(["bora", "dora", "lora"]), backend=backend)
    if backend == "triton" and INTERPRETING:  # NumPy's products differ in a last bit by where in a tile a row stands
        torch.testing.assert_close(first, again, rtol=2.0**-8, atol=1e-4)
    else:
        assert torch.equal(first, again)
    others = bora_linear_mixed(x, weight, bank, bank.index(["bora", "columns", "turned"]), backend=backend)
    assert torch.equal(first[0], others[0]) and not torch.equal(first[1], others[1])


@backends
def test_one_adapter_is_what_bora_linear_computes(backend, device):
    layer, adapters = family(6, 40, 70, torch.float32, device)
    bank = bank_of(layer["weight"], adapters)
    y = bora_linear_mixed(layer["x"], layer["weight"], bank, bank.index(["turned"] * 6), layer["bias"], backend=backend)
    alone = bora_linear(**layer, **adapters["turned"], backend=backend)
    torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)


@backends
def test_small_differences_between_adapters_survive(backend, device):
    """Two adapters whose column scales differ by a thousandth give outputs that differ by it, in bfloat16."""
    require(backend, torch.bfloat16)
    N, K = 64, 256
    weight, x = torch.randn(N, K, device=device).bfloat16() / 16, torch.randn(48, K, device=device).bfloat16()
    A, B, norm = torch.zeros(1, K, device=device), torch.zeros(N, 1, device=device), weight.float().norm(dim=0)
    step = 1 + 1e-3 * torch.randn(K, device=device)
    bank = AdapterBank(weight)
    bank.add("start", (A, B, None, norm), scaling=1.0)
    bank.add("moved", (A, B, None, norm * step), scaling=1.0)
    y = [bora_linear_mixed(x, weight, bank, bank.index([n] * 48), backend=backend) for n in ("start", "moved")]
    exact = x.double() @ (weight.double() * (step.double() - 1)).T
    moved = (y[1].double() - y[0].double()).flatten()
    assert 0.9 < (moved @ exact.flatten()) / exact.flatten().square().sum() < 1.1


@backends
def test_views_packed_batches_and_single_rows(backend, device):
    layer, adapters = family(12, 40, 70, torch.float32, device)
    bank, weight = bank_of(layer["weight"], adapters), layer["weight"]
    names = ["bora", "none", "lora"]
    x = layer["x"]
    packed = bora_linear_mixed(x, weight, bank, bank.index(names, lengths=[5, 0, 7]), backend=backend)
    alone = [bora_linear_mixed(t, weight, bank, bank.index([n] * len(t)), backend=backend) for n, t in
             (("bora", x[:5]), ("lora", x[5:]))]  # fmt: skip
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-6, atol=1e-6)
    whole = bora_linear_mixed(x[None], weight, bank, bank.index(names, lengths=[5, 0, 7]), backend=backend)
    assert torch.equal(whole[0], packed)
    wide_x = torch.cat([x, x], 1).T.contiguous().T[:, :70]  # strides of a column-major matrix
    strided = bora_linear_mixed(wide_x, weight, bank, bank.index(names, lengths=[5, 0, 7]), backend=backend)
    if backend == "triton":
        assert torch.equal(strided, packed)
    torch.testing.assert_close(strided, packed, rtol=1e-6, atol=1e-6)  # PyTorch may sum in another order
    row = bora_linear_mixed(x[0], weight, bank, bank.index(["bora"]), backend=backend)
    torch.testing.assert_close(row, packed[0], rtol=1e-6, atol=1e-6)
    empty = bora_linear_mixed(x[:0], weight, bank, bank.index([]), backend=backend)
    assert empty.shape == (0, 40)


@backends
def test_autocast_and_a_compiled_region(backend, device):
    require(backend, torch.bfloat16)
    layer, adapters = family(3, 40, 70, torch.float32, device)
    bank, weight = bank_of(layer["weight"], adapters, backend=backend), layer["weight"]
    index = bank.index(["bora", None, "dora"])
    with torch.autocast(device, torch.bfloat16):
        y = bora_linear_mixed(layer["x"], weight, bank, index, layer["bias"])
    assert y.dtype == torch.bfloat16
    plain = bora_linear_mixed(layer["x"], weight, bank, index, layer["bias"])
    torch.testing.assert_close(y.float(), plain, rtol=2e-2, atol=4e-2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def twice(x):
        return bora_linear_mixed(x, weight, bank, index, layer["bias"]) * 2

    with torch.no_grad():
        torch.testing.assert_close(twice(layer["x"]), 2 * plain)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_parts_of_a_split_inner_dimension_add_up(device, monkeypatch):
    """Splits that only large weights have, on a small one."""
    from bora_kernels.kernels import mixed_few, mixed_project

    plain = mixed_few.mixed_few_config

    def split(*arguments):
        _, config = plain(*arguments)
        return 3, {**config, "BLOCK_SIZE_C": 16}

    monkeypatch.setattr(mixed_few, "mixed_few_config", split)
    few_columns = {"BLOCK_SIZE_C": 64, "BLOCK_SIZE_R": 4, "num_warps": 4}
    monkeypatch.setattr(mixed_project, "mixed_project_few_config", lambda *_: (2, few_columns))
    check("triton", [1, 2, 0, 5, 4], 53, 110, torch.float32, device)
    check("triton", [4] * 5, 53, 110, torch.float32, device)
    check("triton", [0] * 3, 53, 110, torch.bfloat16, device)


@pytest.fixture
def apart(monkeypatch):
    """Batches whose parts of K were made by one launch and added by another: how many parts each had."""
    mixed_few = pytest.importorskip("bora_kernels.kernels.mixed_few")
    made = []
    plain = mixed_few.mixed_apart_config
    monkeypatch.setattr(mixed_few, "mixed_apart_config", lambda *args: made.append(plain(*args)) or made[-1])
    return made


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize(
    "batch, tokens",
    [([4] * 20, 1), ([3], 17), ([0] * 18, 1), ([1, 3, 0, 5, 6, 4, 2, 1], 4), ([2] * 16 + [5], 1)],
    ids=["one-adapter", "one-sequence", "base-alone", "several", "one-of-another"],
)
def test_parts_added_by_a_launch_of_their_own(batch, tokens, dtype, apart):
    """Without a GPU for 17 to 32 tokens, on an H100 for 33 to 64."""
    if not INTERPRETING:
        batch = batch * 2
    for N, K in ((50, 264), (128, 520), (18, 1040)):
        check("triton", batch, N, K, dtype, "cpu" if INTERPRETING else "cuda", tokens)
    if INTERPRETING or torch.cuda.get_device_capability() == (9, 0):
        splits = list(dict.fromkeys(splits for splits, _ in apart))  # a GPU's launches are planned before they happen
        assert splits == ([3, 2, 4] if INTERPRETING else [2, 3, 5])


def test_an_adapter_alone_meets_nothing_of_its_neighbours(apart, device):
    """A tile of 16 ranks reaches into the next slot where adapters have fewer."""
    require("triton", torch.bfloat16)
    weight, x = torch.randn(64, 264, device=device).bfloat16(), torch.randn(36, 264, device=device).bfloat16()
    x = x[:20] if INTERPRETING else x
    outputs = []
    for neighbour in (0.0, torch.nan):
        bank = AdapterBank(weight, max_rank=3, backend="triton")
        generator = torch.Generator().manual_seed(1)
        lora_A, lora_B = (torch.randn(size, generator=generator).to(device) for size in ((3, 264), (64, 3)))
        bank.add("it", (lora_A, lora_B, None, None), scaling=0.5)
        bank.add("next", (torch.full_like(lora_A, neighbour), torch.zeros_like(lora_B), None, None), scaling=1.0)
        outputs.append(bora_linear_mixed(x, weight, bank, bank.index(["it"] * len(x))))
    assert torch.equal(*outputs) and outputs[0].isfinite().all()


@backends
def test_one_adapter_alone_of_any_rank_and_then_several_by_the_same_index(backend, device):
    require(backend, torch.float32)
    weight, x = torch.randn(40, 70, device=device), torch.randn(5, 70, device=device)
    for rank in (1, 17, 33, 70):
        factors = [torch.randn(rank, 70, device=device), torch.randn(40, rank, device=device)]
        bank = AdapterBank(weight, backend=backend)
        bank.add("first", None)
        bank.add("it", (*factors, torch.rand(40, device=device), torch.rand(70, device=device)), scaling=0.1)
        index = bank.index(["it"] * 5)
        alone = bora_linear_mixed(x, weight, bank, index)
        several = bora_linear_mixed(x, weight, bank, bank.index(["it", "it", None, "it", "first"], out=index))
        torch.testing.assert_close(alone[[0, 1, 3]], several[[0, 1, 3]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(several[[2, 4]], x[[2, 4]] @ weight.T, rtol=1e-5, atol=1e-4)
