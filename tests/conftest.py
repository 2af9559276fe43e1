"""What every test gets: a device, Triton's interpreter where there is no GPU, a seed, NaN in fresh memory."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import warnings
from importlib import metadata

import pytest
import torch

CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if not CUDA:
    # Triton reads this when it is imported, so it comes before any import that could bring Triton in.
    if "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ:
        raise RuntimeError("triton was imported before tests/conftest.py: set TRITON_INTERPRET=1 and try again")
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

from helpers import fast_interpreter  # noqa: E402
from helpers import interpreter_bf16 as bf16  # noqa: E402
from helpers.sample import sample  # noqa: E402

if INTERPRETING:
    fast_interpreter.activate()
    if bf16.unsupported_reason() is None:
        bf16.activate()

try:
    import hypothesis
except ImportError:
    pass
else:
    # The same examples on every run; no deadline, because the interpreter's first call is slow.
    hypothesis.settings.register_profile("bora", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("bora")

# Workers of pytest-xdist share the cores.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _workers))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """What ``-n auto`` means: a few workers where they share a GPU, else pytest-xdist's own choice."""
    return min(4, os.cpu_count() or 1) if CUDA else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-variant",
        action="store_true",
        help="compile every variant of a kernel for every GPU, not as few as have every tile and value",
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too, and all cases of all tests")


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported: the many collections that tests ask for would look at it each time


def pytest_report_header() -> str:
    triton = "no triton"
    if HAS_TRITON:
        triton = f"triton {metadata.version('triton')}{' (interpreter)' if INTERPRETING else ''}"
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    return f"torch {torch.__version__}, {triton}, device {device}, {torch.get_num_threads()} threads"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    present = torch.cuda.device_count() if CUDA else 0
    if not config.getoption("--slow"):
        chosen = sample(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
        if marker := item.get_closest_marker("gpu"):
            (needed,) = marker.args or (1,)
            if present < needed:
                reason = {1: "needs a CUDA device", 2: "needs two GPUs"}[needed]
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> str:
    """Where the kernels run: "cuda", or "cpu" under the interpreter."""
    return "cuda" if CUDA else "cpu"


@pytest.fixture
def interpreter_bf16() -> None:
    """For tests that run bfloat16 kernels: skips where the interpreter would get them wrong."""
    if INTERPRETING and (reason := bf16.unsupported_reason()):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is float32 in convolutions too, where PyTorch's default on a GPU is TF32."""
    if CUDA:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


_FILLED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _nan_filled_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh floating-point memory with NaN, so that an output which no kernel writes shows.

    ``@pytest.mark.plain_empty`` opts out. PyTorch's deterministic mode can fill memory too, but it also
    changes or forbids other operations.
    """
    if request.node.get_closest_marker("plain_empty"):
        return
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, _filling(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _filling(globals()[f"_{name}"]))


def _filling(allocate):
    def filled(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # Not what PyTorch allocates while it traces: fake and functional tensors are subclasses.
        if type(tensor) is torch.Tensor and tensor.dtype in _FILLED_DTYPES:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return filled


# The methods of torch.Tensor, which torch.compile cannot trace once replaced, in terms of operators.
def _new_empty(self, *size, requires_grad=False, **options):
    size = options.pop("size", size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size)
    return torch.ops.aten.new_empty(self, size, **options).requires_grad_(requires_grad)


def _new_empty_strided(self, size, stride, requires_grad=False, **options):
    return torch.ops.aten.new_empty_strided(self, size, stride, **options).requires_grad_(requires_grad)


@pytest.fixture
def fresh_replays(monkeypatch):
    """No recordings, no warnings said; a warning fails the test that does not expect it."""
    from bora_kernels.replay import plan_cache, switch

    plan_cache.clear()
    monkeypatch.setattr(switch, "_warned", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot replay.*")
        yield
    plan_cache.clear()


@pytest.fixture
def driver(monkeypatch):
    """A CUDA driver played by Python."""
    from helpers.fake_driver import Driver

    yield from Driver().play(monkeypatch)
