"""What is measured: shapes, tokens, ranks, dtypes and modes, by default and by the command line's options."""

from __future__ import annotations

import fnmatch
import itertools
from dataclasses import dataclass

import torch

LEVELS = ("layer", "model")
BASES = ("dense", "nf4")
MODES = ("step", "forward", "inference")  # a workload's references are made once, in its first mode
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One workload in one mode; all providers run it.

    ``shape`` is "NxK" (out_features x in_features) for a layer and the name of a stack in ``models`` for a
    model. Modes: "step" is forward and backward (gradients of the input and of the adapters), "forward" is a
    forward that records a graph, "inference" a forward under ``torch.no_grad``. Over the base "nf4" the linear layers
    of the model are bitsandbytes' 4-bit ones, in every provider.
    """

    level: str
    mode: str
    shape: str
    batch: int
    length: int
    rank: int
    dtype: str
    checkpointing: bool = False
    base: str = "dense"
    main_only: bool = False  # a point of a chart, or a further model: only the providers that charts show
    lead: bool = False  # of the first layer, or of the first model as it is

    def __str__(self) -> str:
        parts = [self.mode, self.shape, f"{self.batch}x{self.length}", f"r{self.rank}", self.dtype]
        parts += [self.base] * (self.base != "dense") + ["checkpointed"] * self.checkpointing
        return "-".join(parts)

    def matches(self, patterns: str | None) -> bool:
        """Whether the name is like one of several patterns, with commas between them; None is like every name."""
        return any(fnmatch.fnmatchcase(str(self), pattern) for pattern in (patterns or "*").split(","))

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def graphed(self) -> bool:
        """Whether steps are timed as CUDA graphs as well: layers, and models whose step waits for the host."""
        return self.level == "layer" or (self.tokens <= 1024 and not self.checkpointing)

    @property
    def workload(self) -> tuple:
        """What inputs and references depend on."""
        return (self.level, self.shape, self.batch, self.length, self.rank, self.dtype, self.base)


# (N x K, tokens, rank, modes); the first is the one of --quick; --full takes all modes of each
_STEP, _STEP_AND_INFERENCE = ("step",), ("step", "inference")
_CUDA_LAYERS = [
    ("4096x4096", 8192, 16, _STEP_AND_INFERENCE),
    ("14336x4096", 8192, 16, _STEP),
    ("4096x14336", 8192, 16, _STEP),
    ("4096x4096", 2048, 16, _STEP_AND_INFERENCE),
    ("1024x4096", 8192, 16, _STEP),
]
_CUDA_POINTS = [  # of charts against tokens, width and rank
    *(("4096x4096", tokens, 16) for tokens in (512, 32768)),
    *((shape, 8192, 16) for shape in ("2048x2048", "8192x8192")),
    *(("4096x4096", 8192, rank) for rank in (8, 64, 256)),
]
_CPU_LAYERS = [
    ("1024x1024", 512, 16, MODES),
    ("2816x1024", 512, 16, _STEP),
    ("1024x2816", 512, 16, _STEP),
    ("1024x1024", 128, 16, _STEP),
    ("1024x1024", 512, 64, _STEP),
]
_CPU_POINTS = [("1024x1024", 1024, 16), ("512x512", 512, 16), ("1536x1536", 512, 16)]
_MODELS = {"cuda": ("llama3-8b", [(4, 2048), (1, 1024)]), "cpu": ("tiny", [(2, 128)])}
_OTHER_MODELS = {  # biases; GeGLU and norms of 1 + w: steps of the providers that charts show
    "cuda": [("qwen2.5-7b", 4, 2048), ("gemma2-9b", 4, 2048)],
    "cpu": [("tiny-qwen2", 2, 128), ("tiny-gemma2", 2, 128)],
}
# (mode, checkpointing, base, the batches of a run without --full)
_MODEL_RUNS = [
    ("step", False, "dense", slice(None)),
    ("step", True, "dense", slice(1)),
    ("inference", False, "dense", slice(0)),
    ("step", False, "nf4", slice(-1, None)),
    ("step", True, "nf4", slice(0)),
]


def layer_cases(
    device: str,
    *,
    shapes: list[str] | None = None,
    tokens: list[int] | None = None,
    ranks: list[int] | None = None,
    dtypes: list[str] | None = None,
    modes: list[str] | None = None,
    quick: bool = False,
    full: bool = False,
) -> list[Case]:
    """The layer's cases for "cuda" or "cpu".

    Any of shapes, tokens and ranks replaces the list of the device by their product, modes those of each layer.
    """
    layers, points = (_CUDA_LAYERS, _CUDA_POINTS) if device == "cuda" else (_CPU_LAYERS, _CPU_POINTS)
    dtypes = dtypes or ["bf16" if device == "cuda" else "fp32"]
    shape, length, rank, _ = layers[0]
    chosen: list[tuple[str, int, int, tuple[str, ...], bool]]
    if shapes or tokens or ranks:
        rows = itertools.product(shapes or [shape], tokens or [length], ranks or [rank])
        chosen = [(*row, MODES, False) for row in rows]
    else:
        chosen = [(*layer, False) for layer in (layers[:1] if quick else layers)]
        chosen += [] if quick else [(*point, _STEP, True) for point in points]
    return [
        Case("layer", mode, shape, 1, length, rank, dtype, main_only=main_only, lead=number == 0)
        for dtype in dtypes
        for number, (shape, length, rank, row_modes, main_only) in enumerate(chosen)
        for mode in MODES
        if mode in (modes or MODES) and (mode in row_modes or ((full or modes) and not main_only))
    ]


def model_cases(
    device: str,
    *,
    ranks: list[int] | None = None,
    dtypes: list[str] | None = None,
    modes: list[str] | None = None,
    quick: bool = False,
    full: bool = False,
) -> list[Case]:
    """The model's cases: training steps, some checkpointed; ``full`` has every batch in every way, and inference.

    Modes that are asked for are had in full. Over the 4-bit base training only: in eval mode on a CPU bitsandbytes
    stores the weights anew, with a loss.
    """
    device = "cuda" if device == "cuda" else "cpu"
    shape, batches = _MODELS[device]
    others = [] if quick or "step" not in (modes or MODES) else _OTHER_MODELS[device]
    dtypes = dtypes or ["bf16" if device == "cuda" else "fp32"]
    batches = batches[-1:] if quick else batches
    return [
        Case(
            "model", mode, shape, batch, length, rank, dtype, checkpointing, base,
            lead=(batch, length) == batches[0] and not checkpointing and base == "dense",
        )
        for dtype in dtypes
        for rank in ranks or [16]
        for batch, length in batches
        for mode, checkpointing, base, default in _MODEL_RUNS
        if mode in (modes or MODES) and (full or modes or (batch, length) in batches[default])
    ] + [
        Case("model", "step", shape, batch, length, rank, dtype, main_only=True)
        for dtype in dtypes
        for rank in ranks or [16]
        for shape, batch, length in others
    ]  # fmt: skip
