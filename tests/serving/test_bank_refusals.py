"""What a bank refuses: adapters that cannot enter, options, and batches; all is as it was then."""

import pytest
import torch
from helpers.banks import K, N, assert_same, linear_of, state, tensors

from bora_kernels import AdapterBank, FusedBoraLinear, bora_linear_mixed
from bora_kernels.serving import BASE


@pytest.fixture
def weight(device) -> torch.Tensor:
    return torch.randn(N, K, device=device)


def test_what_cannot_enter_leaves_the_bank_as_it_was(weight, device):
    bank = AdapterBank(weight, max_rank=4)
    good = tensors(0, device=device)
    bank.add("a", good, scaling=1.0)
    merged = FusedBoraLinear.from_linear(linear_of(weight), r=2)
    merged.merge()
    elsewhere = FusedBoraLinear.from_linear(linear_of(torch.randn(N, K, device=device)), r=2)
    transposed = FusedBoraLinear.from_linear(linear_of(torch.randn(K, N, device=device)), r=2)
    A, B, row, col = good
    before = state(bank)
    for name, adapter, options, error, message in (
        ("a", good, {"scaling": 1.0}, ValueError, "name must be a string that no adapter has"),
        (BASE, good, {"scaling": 1.0}, ValueError, "name must be a string"),
        (3, good, {"scaling": 1.0}, ValueError, "name must be a string .* got 3"),
        ("b", good, {}, ValueError, "scaling must be given"),
        ("b", merged, {}, ValueError, r"adapter must be a layer that is not merged"),
        ("b", merged, {"scaling": 1.0}, ValueError, "scaling must be None with a layer"),
        ("b", elsewhere, {}, ValueError, "another weight of the same shape"),
        ("b", transposed, {}, ValueError, rf"bank's weight \[{N}, {K}\], got one over \[{K}, {N}\]"),
        ("b", (A, B, row), {"scaling": 1.0}, TypeError, "adapter must be a layer, or lora_A"),
        ("b", "a", {"scaling": 1.0}, TypeError, "adapter must be a layer"),
        ("b", (A, B, row[:-1], col), {"scaling": 1.0}, ValueError, rf"magnitude_row must be \[{N}\], got \[{N - 1}\]"),
        ("b", (B, A, row, col), {"scaling": 1.0}, ValueError, "lora_A must be"),
        ("b", tensors(0, 5, device=device), {"scaling": 1.0}, ValueError, "lora_A must be of rank at most 4, got 5"),
        ("b", good, {"scaling": float("nan")}, ValueError, "scaling must be finite"),
        ("b", good, {"scaling": 1.0, "norm_order": "rows"}, ValueError, "norm_order must be one of"),
        ("b", good, {"scaling": 1.0, "eps": 0.0}, ValueError, "eps must be positive"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            bank.add(name, adapter, **options)
        if name == "b":
            with pytest.raises(error, match=message):
                bank.replace("a", adapter, **options)
        assert_same(before, state(bank))
    for call in (lambda: bank.remove("b"), lambda: bank.replace("b", good, scaling=1.0)):
        with pytest.raises(ValueError, match=r"name must be one of \['a'\], got 'b'"):
            call()
    assert_same(before, state(bank))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"max_adapters": 0}, ValueError, "max_adapters must be an integer of at least 1"),
        ({"max_adapters": None}, ValueError, "max_adapters must be an integer of at least 1"),
        ({"max_rank": 513}, ValueError, "max_rank must be at most 512"),
        ({"max_rank": 0}, ValueError, "max_rank must be an integer of at least 1"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating-point dtype"),
    ],
)
def test_options_of_a_bank(weight, arguments, error, message):
    with pytest.raises(error, match=message):
        AdapterBank(weight, **arguments)
    with pytest.raises(ValueError, match="weight must be"):
        AdapterBank(weight[0])


def test_a_batch_that_cannot_be(weight, device):
    bank, other = AdapterBank(weight), AdapterBank(torch.randn(N, K, device=device))
    bank.add("a", tensors(0, device=device), scaling=1.0)
    bank.add("b", tensors(1, device=device), scaling=1.0)
    x, index = torch.randn(2, 3, K, device=device), bank.index(["b", BASE])
    before = state(bank)
    for entries, error, message in (
        (["a", "c"], ValueError, r"entries must be of \['a', 'b'\] or '__base__', got 'c'"),
        ([0, 3], ValueError, r"entries must be 0, for the base layer, or of \[1, 2\], got 3"),
        ([-1], ValueError, "got -1"),
        ([True], TypeError, "got a bool"),
        ([1.0], TypeError, "got a float"),
        ("a", TypeError, "entries must be a list .* got str"),
        (torch.tensor([1]), TypeError, "entries must be a list .* got Tensor"),
    ):
        with pytest.raises(error, match=message):
            bank.index(entries)
    with pytest.raises(ValueError, match="lengths must be 2 numbers of tokens"):
        bank.index(["a", "b"], lengths=[3])
    with pytest.raises(ValueError, match="out must have 3 entries"):
        bank.index(["a", "b", "b"], out=index)
    assert_same(before, state(bank))

    with pytest.raises(
        ValueError, match=r"index must have an entry for each of the 2 entries of x \[2, 3, 37\].*got 3"
    ):
        bora_linear_mixed(x, weight, bank, bank.index(["a"] * 3))
    with pytest.raises(ValueError, match="weight must be the one that the bank was made for"):
        bora_linear_mixed(x, weight.clone(), bank, index)
    with pytest.raises(ValueError, match="it has 'b' in slot 2, and the bank has none of that name"):
        bora_linear_mixed(x, other.weight, other, index)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 37\] for weight"):
        bora_linear_mixed(x[..., 1:], weight, bank, index)
    with pytest.raises(TypeError, match="x must have weight's dtype"):
        bora_linear_mixed(x.double(), weight, bank, index)
    with pytest.raises(ValueError, match=r"bias must be \[23\], got \[22\]"):
        bora_linear_mixed(x, weight, bank, index, torch.zeros(22, device=device))
    with pytest.raises(TypeError, match="index must be what bank.index"):
        bora_linear_mixed(x, weight, bank, torch.tensor([1, 2], device=device))
    with pytest.raises(TypeError, match="bank must be an AdapterBank"):
        bora_linear_mixed(x, weight, index, bank)
    with pytest.raises(
        ValueError, match="x must not require a gradient, got one that does: a mixed batch is for infer"
    ):
        bora_linear_mixed(x.clone().requires_grad_(), weight, bank, index)
    with pytest.raises(ValueError, match="the batch must have one adapter in transforms"):
        torch.func.vmap(lambda row: bora_linear_mixed(row, weight, bank, bank.index(["a"] * 3)))(x)
    with torch.no_grad():
        y = bora_linear_mixed(x.clone().requires_grad_(), weight, bank, index)
    assert not y.requires_grad
    bank.remove("b")
    with pytest.raises(ValueError, match="make it anew"):
        bora_linear_mixed(x, weight, bank, index)
