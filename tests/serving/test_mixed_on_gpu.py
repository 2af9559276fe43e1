"""What only a GPU shows of mixed batches of few tokens: launches that overlap, replayed and captured."""

import pytest
import torch

from bora_kernels import AdapterBank, bora_linear_mixed
from bora_kernels.replay import switch

pytestmark = pytest.mark.gpu

SIZES = [(4096, 4096), (1024, 4096), (14336, 1024), (300, 520)]
BATCHES = [1, 7, 16, 32, 33, 48, 64]


def layer_and_bank(N: int, K: int) -> tuple[torch.Tensor, AdapterBank]:
    generator = torch.Generator("cuda").manual_seed(N + K)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    weight = (randn(N, K) / K**0.5).bfloat16()
    bank = AdapterBank(weight, 4, max_rank=16)
    for rank in (16, 3, 9):
        magnitudes = weight.float().norm(dim=1), weight.float().norm(dim=0) * (1 + 0.1 * randn(K))
        bank.add(f"rank {rank}", (randn(rank, K) / K**0.5, randn(N, rank) / rank, *magnitudes), scaling=0.5)
    return weight, bank


@pytest.mark.parametrize("M", BATCHES)
@pytest.mark.parametrize("N, K", SIZES)
def test_the_same_bits_one_by_one_as_a_graph_and_captured(N, K, M, monkeypatch):
    """And of each batch what a batch of another order gives: nobody reads what the launch before has yet to write."""
    weight, bank = layer_and_bank(N, K)
    xs = torch.randn(6, M, K, device="cuda").bfloat16()
    names = [bank.names[0]] * M, [(*bank.names, None)[m % 4] for m in range(M)]
    batches = [bank.index(each) for each in names]
    with monkeypatch.context() as patch:
        patch.setattr(switch, "off", True)
        expected = [[bora_linear_mixed(x, weight, bank, index) for x in xs] for index in batches]
    for index, outputs in zip(batches, expected, strict=True):
        for _ in range(2):  # recorded, launch by launch, then as a graph
            assert all(
                torch.equal(bora_linear_mixed(x, weight, bank, index), y) for x, y in zip(xs, outputs, strict=True)
            )

    static, index = xs[0].clone(), bank.index(names[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [bora_linear_mixed(static, weight, bank, index) for _ in range(4)]
    for batch in (0, 1, 0):
        bank.index(names[batch], out=index)
        for x, y in zip(xs, expected[batch], strict=True):
            static.copy_(x)
            graph.replay()
            assert all(torch.equal(each, y) for each in captured)
