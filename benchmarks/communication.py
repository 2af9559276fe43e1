"""What a layer sends between devices, and a model of the time that takes: the tables of docs/cost_model.md.

``messages`` lists every collective of one step of one tensor parallel layer; the tests compare it with what the layer
sends. Times are bytes over assumed bandwidths plus an assumed latency for each collective: nothing here is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NamedTuple

GPUS = (8, 64, 512, 1024)
METHODS = ("lora", "dora", "bora")


class Link(NamedTuple):
    """Between devices: bytes per second each way and device, and seconds that any collective takes."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Hardware:
    """Assumed, of an H100 node."""

    node: int = 8  # devices joined by NVLink
    nvlink: Link = Link(360e9, 12e-6)
    network: Link = Link(40e9, 40e-6)
    memory: float = 3.0e12  # bytes per second
    compute: float = 600e12  # bf16 operations per second in large products


class Message(NamedTuple):
    """One collective; ``elements`` counts the whole tensor, of which all-gather and reduce-scatter move one part."""

    what: str
    collective: str
    elements: int
    itemsize: int = 4
    activation: bool = False

    def seconds(self, ranks: int, link: Link) -> float:
        """Of a ring: an all-reduce passes every part around twice, the others once."""
        if ranks == 1:
            return 0.0
        rounds = 2 if self.collective == "all_reduce" else 1
        return link.latency + rounds * (ranks - 1) / ranks * self.elements * self.itemsize / link.bandwidth


def messages(
    style: str,  # "colwise" (out_features sharded) or "rowwise" (in_features sharded)
    M: int,  # tokens
    N: int,  # out_features
    K: int,  # in_features
    R: int,  # rank
    *,
    method: str = "bora",
    detach_norm: bool = False,
    sequence: bool = False,  # tokens are sharded outside of the layer
    itemsize: int = 2,  # of activations
) -> list[Message]:
    """The collectives of forward and backward in their order, with all gradients asked for."""
    colwise = style == "colwise"
    axis = K if colwise else N  # the replicated one
    normalized = method == "bora" or (method == "dora" and not colwise)
    x = [Message("x", "all_gather", M * K, itemsize, True)] if colwise and sequence else []
    norms = [Message("squares", "all_reduce", axis)] if normalized else []
    y = [] if colwise else [Message("y", "reduce_scatter" if sequence else "all_reduce", M * N, itemsize, True)]
    dy = [] if colwise or not sequence else [Message("dy", "all_gather", M * N, itemsize, True)]
    dx = [Message("dx", "reduce_scatter" if sequence else "all_reduce", M * K, itemsize, True)] if colwise else []
    factor = "dA" if colwise else "dB"
    if detach_norm or method == "lora":
        gradients = [Message(factor, "all_reduce", axis * (R + normalized)), *dx]
    elif normalized:
        sums = Message("D" if colwise else "S", "all_reduce", axis)
        gradients = [sums, *dx, Message(factor, "all_reduce", axis * R)]
    else:
        gradients = [*dx, Message(factor, "all_reduce", axis * R)]
    return x + norms + y + dy + gradients


class Linear(NamedTuple):
    """The linear layers of a name in a decoder block."""

    name: str
    style: str
    N: int
    K: int
    number: int = 1
    inputs: int = 1  # how many of them bring an input of their own, rather than sharing one that is replicated


@dataclass(frozen=True)
class Model:
    """A Llama 3.1 model: its blocks' linear layers (the key and value heads are 1024 features in all three)."""

    name: str
    hidden: int
    intermediate: int

    @property
    def linears(self) -> list[Linear]:
        h, f = self.hidden, self.intermediate
        return [
            Linear("q", "colwise", h, h),
            Linear("k, v", "colwise", 1024, h, 2, 0),  # they share that of q
            Linear("o", "rowwise", h, h),
            Linear("gate, up", "colwise", f, h, 2),
            Linear("down", "rowwise", h, f),
        ]


MODELS = [Model("8B", 4096, 14336), Model("70B", 8192, 28672), Model("405B", 16384, 53248)]


class Cost(NamedTuple):
    """Seconds of one layer and step on each device."""

    frozen: float  # products, or FSDP's gathers of the weight where they take longer; messages of activations
    adapter: float  # tensor parallel messages of the adapter
    replicas: float  # the adapter's part of FSDP's messages
    norms: float  # reads of the weight


def cost(
    linear: Linear, gpus: int, tokens: int, rank: int, hardware: Hardware, *, method: str, detach_norm: bool = False
) -> Cost:
    """Tensor and sequence parallel within a node, FSDP2 across nodes; the frozen weight is gathered for both passes."""
    _, style, N, K, number, inputs = linear
    node, network = gpus // hardware.node, hardware.network._replace(latency=0.0)  # a block's are one message
    seconds = {True: 0.0, False: 0.0}
    for message in messages(style, tokens, N, K, rank, sequence=True, method=method, detach_norm=detach_norm):
        seconds[message.activation] += message.seconds(hardware.node, hardware.nvlink)
    row_magnitude, col_magnitude = method != "lora", method == "bora"
    of_rows, of_columns = (rank + row_magnitude) * N, (rank + col_magnitude) * K
    trained = of_rows // hardware.node + of_columns if style == "colwise" else of_rows + of_columns // hardware.node
    weight = N * K // hardware.node
    gathers = 2 * Message("weight", "all_gather", weight, 2).seconds(node, network)
    products = 4 * tokens * weight / hardware.compute
    replicas = 3 * Message("adapter", "all_gather", trained).seconds(node, network)  # twice gathered, once reduced
    reads = (row_magnitude + col_magnitude) * (1 if detach_norm else 2)
    frozen = number * max(products, gathers) + inputs * seconds[True]
    return Cost(frozen, *(number * t for t in (seconds[False], replicas, reads * 2 * weight / hardware.memory)))


def _bytes(sent: list[Message], *, activation: bool = False) -> int:
    return sum(m.elements * m.itemsize for m in sent if m.activation == activation)


def layer_table(tokens: int, rank: int) -> list[str]:
    """Megabytes of tensor parallel messages of each linear layer."""
    lines = [
        "| model | layer | N × K | sharded | activations | LoRA | DoRA | BoRA | BoRA over LoRA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for name, style, N, K, *_ in model.linears:
            lora, dora, bora = (messages(style, tokens, N, K, rank, method=m, sequence=True) for m in METHODS)
            cells = [model.name, name, f"{N} × {K}", style]
            cells += [f"{_bytes(lora, activation=True) / 1e6:.0f}"]
            cells += [f"{_bytes(sent) / 1e6:.3f}" for sent in (lora, dora, bora)]
            lines.append("| " + " | ".join([*cells, f"+{_bytes(bora) / _bytes(lora) - 1:.1%}"]) + " |")
    return lines


def block_table(tokens: int, rank: int, hardware: Hardware) -> list[str]:
    """Milliseconds of each block and what the adapters add to it."""
    lines = [
        "| model | GPUs | frozen, ms | LoRA, µs | DoRA, µs | BoRA detached, µs | BoRA exact, µs | its messages, µs "
        "| BoRA exact over LoRA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for gpus in GPUS:
            sums = []
            for method, detach_norm in (("lora", False), ("dora", False), ("bora", True), ("bora", False)):
                costs = [
                    cost(linear, gpus, tokens, rank, hardware, method=method, detach_norm=detach_norm)
                    for linear in model.linears
                ]
                sums.append(Cost(*map(sum, zip(*costs, strict=True))))
            added = [sum(total[1:]) for total in sums]
            cells = [
                model.name,
                str(gpus),
                f"{sums[0].frozen * 1e3:.2f}",
                *(f"{seconds * 1e6:.0f}" for seconds in added),
            ]
            cells += [f"{(sums[-1].adapter + sums[-1].replicas) * 1e6:.0f}"]
            lines.append(
                "| " + " | ".join([*cells, f"+{(added[-1] - added[0]) / (sums[0].frozen + added[0]):.1%}"]) + " |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of docs/cost_model.md.")
    parser.add_argument("--tokens", type=int, default=8192, help="of one step of one node (default: 8192)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    for field, unit in (("nvlink", "GB/s"), ("network", "GB/s")):
        default = getattr(Hardware, field).bandwidth / 1e9
        parser.add_argument(f"--{field}", type=float, default=default, help=f"{unit} a device (default: {default:g})")
    arguments = parser.parse_args()
    hardware = Hardware(
        nvlink=Hardware.nvlink._replace(bandwidth=arguments.nvlink * 1e9),
        network=Hardware.network._replace(bandwidth=arguments.network * 1e9),
    )
    for table in (
        layer_table(arguments.tokens, arguments.rank),
        block_table(arguments.tokens, arguments.rank, hardware),
    ):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
