"""The bank: adapters come, change and go while batches are served, in bounded memory."""

import gc
import warnings
import weakref

import pytest
import torch
from helpers.banks import K, N, assert_same, linear_of, state, tensors
from helpers.cases import NAMES, SCALING, Case, backends, cancelled, dtypes, orders, require

from bora_kernels import AdapterBank, FusedBoraLinear, FusedDoraLinear, bora_linear_mixed
from bora_kernels.reference import bora_linear_ref
from bora_kernels.serving import Adapter


@pytest.fixture
def weight(device) -> torch.Tensor:
    return torch.randn(N, K, device=device)


@pytest.mark.parametrize("max_rank", [5, None], ids=["fixed", "grows"])
@backends
@pytest.mark.slow
def test_a_thousand_swaps_leave_no_stale_result_and_take_no_memory(backend, max_rank, weight, device):
    """With what entered, changed or left in each step, an index of the step before is right, or is refused."""
    bank, x = AdapterBank(weight, 4, max_rank=max_rank, backend=backend), torch.randn(4, K, device=device)
    addresses, known, entered, living = [t.data_ptr() for t in bank.slots], {}, [], []
    generator = torch.Generator().manual_seed(0)

    def one_of(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def check(served: list[str], index) -> None:
        y = bora_linear_mixed(x[: len(served)], weight, bank, index)
        for row, name in enumerate(served):
            torch.testing.assert_close(y[row], known[name][row], rtol=1e-4, atol=1e-4)

    for step in range(1000):
        served = list(bank.names)
        before = bank.index(served)
        seed, name = one_of(12), f"adapter {one_of(6)}"
        adapter, scaling = (
            tensors(seed, 1 + seed % 5, ("bora", "dora", "columns", "lora")[seed % 4], device),
            0.5 + seed,
        )
        if name in bank:
            bank.replace(name, adapter, scaling=scaling)
        else:
            if len(bank) == 4:
                del known[bank.names[0]]
                bank.remove(bank.names[0])
            bank.add(name, adapter, scaling=scaling)
        known[name] = bora_linear_ref(x, weight, *adapter, scaling=scaling)
        entered.append(weakref.ref(adapter.lora_A))
        if backend == "torch" or step % 50 == 0:
            check(list(known), bank.index(list(known)))
            if set(served) <= set(known):
                check(served, before)
            else:
                with pytest.raises(ValueError, match="make it anew"):
                    bora_linear_mixed(x[: len(served)], weight, bank, before)
        if step in (100, 999):
            del adapter, before
            gc.collect()
            living.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert living[1] <= living[0]  # what other tests left may end meanwhile
    assert not any(ref() is not None for ref in entered)
    assert bank.nbytes == 4 * (1 + 4) * (5 + 1) * (N + K) and len(bank) == 4
    if max_rank is not None:
        assert [t.data_ptr() for t in bank.slots] == addresses


def test_nothing_of_an_adapter_is_kept_but_its_slot(weight, device):
    bank = AdapterBank(weight)
    layer = FusedBoraLinear.from_linear(linear_of(weight), r=3)
    kept = [weakref.ref(p) for p in (layer, layer.lora_A, layer.magnitude_row)]
    bank.add("a", layer)
    del layer
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3
    before = bank.nbytes
    for _ in range(5):
        bank.remove("a")
        bank.add("a", tensors(1, 3, device=device), scaling=1.0)
    assert bank.nbytes == before


def test_memory_grows_by_what_enters_up_to_the_maximum(weight, device):
    bank = AdapterBank(weight, max_adapters=5)
    sizes = [bank.nbytes]
    for number in range(5):
        bank.add(str(number), tensors(number, 1 + number, device=device), scaling=1.0)
        sizes.append(bank.nbytes)
    assert sizes == sorted(sizes) and bank.slots.lora_A.shape == (6, 5, K)
    x = torch.randn(5, K, device=device)
    y = bora_linear_mixed(x, weight, bank, bank.index([str(number) for number in range(5)]))
    for number in range(5):  # what entered first was copied as the memory grew
        alone = bora_linear_ref(x[number], weight, *tensors(number, 1 + number, device=device), scaling=1.0)
        torch.testing.assert_close(y[number], alone, rtol=1e-4, atol=1e-4)
    before = state(bank)
    with pytest.raises(ValueError, match=r"max_adapters must be more than 5 .* 'more': remove one first; '0' was used"):
        bank.add("more", None)
    bank.index(["1", "0"])
    assert bank.names == ("2", "3", "4", "0", "1")
    with pytest.raises(ValueError, match="'2' was used longest ago"):
        bank.add("more", None)
    assert_same((bank.names, *before[1:]), state(bank))


@backends
@dtypes
@orders
@pytest.mark.parametrize("axis, left", [("row", 0.2), ("row", 0.01), ("col", 0.1)])
def test_an_adapter_that_cancels_a_line_is_warned_of(backend, dtype, order, axis, left, device):
    """And its outputs err by what the warning says."""
    require(backend, dtype)
    case = Case(40, 30, 45, 3, dtype=dtype, order=order, bias=False, seed=6)
    ordinary = case.inputs(device)
    inputs, x, weight = cancelled(ordinary, axis, left), ordinary["x"], ordinary["weight"]
    bank = AdapterBank(weight, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(3):
            large = ordinary | {"lora_B": 10.0**number * ordinary["lora_B"]}
            adapter = Adapter(*(large[name] for name in Adapter._fields))
            bank.add(f"of size {number}", adapter, scaling=SCALING, norm_order=order)
        bank.add("none", None)
    adapter = Adapter(*(inputs[name] for name in Adapter._fields))
    said = rf"adapter 'undo' leaves less than half .* \[30, 45\].*about {torch.finfo(dtype).eps / 2:.0e} / f"
    with pytest.warns(UserWarning, match=said) as caught:
        bank.add("undo", adapter, scaling=SCALING, norm_order=order)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=said.replace("undo", "of size 0")):
        bank.replace("of size 0", adapter, scaling=SCALING, norm_order=order)
    y = bora_linear_mixed(x[None], weight, bank, bank.index(["undo"]))[0].double()
    wide = {name: t.double() for name, t in inputs.items() if t is not None}
    exact = bora_linear_ref(**wide, scaling=SCALING, norm_order=order)
    if axis == "row":
        y, exact = y[:, 1], exact[:, 1]
    error = ((y - exact).norm() / exact.norm()).item()
    assert error <= 2 * torch.finfo(dtype).eps / left, (NAMES[dtype], error)


def test_word_of_cancelled_lines_may_be_left_on_the_device(weight, device):
    inputs = cancelled(Case(1, N, K, 2, bias=False).inputs(device) | {"weight": weight}, "row", 0.1)
    adapter, bank, words = Adapter(*(inputs[name] for name in Adapter._fields)), AdapterBank(weight), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank.add("unasked", adapter, scaling=SCALING, judge=None)
        bank.add("undo", adapter, scaling=SCALING, judge=lambda *word: words.append(word))
        bank.replace("unasked", tensors(2, device=device), scaling=SCALING, judge=lambda *word: words.append(word))
    assert [(name, of.data_ptr() == weight.data_ptr(), word.any().item()) for name, of, word in words] == [
        ("undo", True, True),
        ("unasked", True, False),
    ]


def test_a_warning_that_is_an_error_leaves_the_bank_as_it_was(weight, device):
    inputs = cancelled(Case(1, N, K, 2, bias=False).inputs(device) | {"weight": weight}, "row", 0.1)
    bank = AdapterBank(weight)
    before = state(bank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="adapter 'undo' leaves less than half"):
            bank.add("undo", Adapter(*(inputs[name] for name in Adapter._fields)), scaling=SCALING)
    assert_same(before, state(bank))


def test_layers_enter_with_their_own_options(weight, device):
    bank = AdapterBank(weight)
    layers = {
        "bora": FusedBoraLinear.from_linear(linear_of(weight), r=3, alpha=12, norm_order="col_row"),
        "dora": FusedDoraLinear.from_linear(linear_of(weight.clone()), r=2, alpha=5, rslora=True),  # a copy of the base
    }
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.lora_B)
        bank.add(name, layer)
    x = torch.randn(2, 4, K, device=device)
    y = bora_linear_mixed(x, weight, bank, bank.index(list(layers)))
    for number, layer in enumerate(layers.values()):
        with torch.no_grad():
            torch.testing.assert_close(y[number], layer(x[number]), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layers["bora"].lora_B.add_(1)
    assert torch.equal(bora_linear_mixed(x, weight, bank, bank.index(list(layers))), y), "changed before replace"
    bank.replace("bora", layers["bora"])
    with torch.no_grad():
        changed = layers["bora"](x[0])
    torch.testing.assert_close(
        bora_linear_mixed(x, weight, bank, bank.index(list(layers)))[0], changed, rtol=1e-5, atol=1e-5
    )


def test_an_index_is_shared_by_the_banks_of_a_model(weight, device):
    other = torch.randn(K, N, device=device)
    first, second = AdapterBank(weight), AdapterBank(other)
    for bank in (first, second):
        for name in ("a", "b"):
            bank.add(name, None)
    index = first.index(["b", None])
    x = torch.randn(2, K, device=device)
    y = bora_linear_mixed(bora_linear_mixed(x, weight, first, index), other, second, index)
    torch.testing.assert_close(y, x @ weight.T @ other.T, rtol=1e-4, atol=1e-4)


def test_an_index_is_overwritten_in_place(weight, device):
    bank = AdapterBank(weight)
    bank.add("a", tensors(0, device=device), scaling=1.0)
    x, index = torch.randn(3, K, device=device), bank.index([None] * 3)
    address = index.tensor.data_ptr()
    assert bank.index(["a", None, "a"], out=index) is index and index.tensor.data_ptr() == address
    expected = bora_linear_mixed(x, weight, bank, bank.index(["a", None, "a"]))
    assert torch.equal(bora_linear_mixed(x, weight, bank, index), expected)


@pytest.mark.parametrize("exponent", [-14, 14])
def test_float16_scales_far_from_each_other_fit(exponent, device):
    """a large and g small, or the other way around: x⊙g alone would leave float16's range."""
    weight, power = torch.randn(24, 40, device=device).half(), 2.0**exponent
    inputs = Case(1, 24, 40, 2).inputs(device)
    A, B = inputs["lora_A"], inputs["lora_B"]
    row, col = weight.float().norm(dim=1), weight.float().norm(dim=0)
    bank = AdapterBank(weight)
    bank.add("a", (A, B, row / power, col), scaling=1.0)  # the first magnitude is free up to a factor
    bank.add("b", (A, B, row, col), scaling=1.0)
    x = torch.randn(3, 40, device=device).half()
    y, plain = (bora_linear_mixed(x, weight, bank, bank.index([name] * 3)) for name in "ab")
    torch.testing.assert_close(y, plain, rtol=5e-3, atol=5e-3)
