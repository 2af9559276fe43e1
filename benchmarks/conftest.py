"""Options, the session's harness, and what a session prints and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import measure, sweep
from .cases import DTYPES, LEVELS, MODES, layer_cases, model_cases
from .harness import Harness
from .providers import PROVIDERS

_HARNESS = pytest.StashKey[Harness]()


def pytest_addoption(parser: pytest.Parser) -> None:
    def names(allowed):
        def parse(text: str) -> list[str]:
            chosen = [name for name in text.split(",") if name]
            if unknown := [name for name in chosen if name not in allowed]:
                raise pytest.UsageError(f"unknown: {', '.join(unknown)}; there are {', '.join(allowed)}")
            return chosen

        return parse

    def shapes(text: str) -> list[str]:
        for shape in text.split(","):
            sizes = shape.split("x")
            if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
                raise pytest.UsageError(f"--shapes must be like 4096x4096,14336x4096, got {text}")
        return text.split(",")

    def integers(text: str) -> list[int]:
        if not all(number.isdecimal() and int(number) > 0 for number in text.split(",")):
            raise pytest.UsageError(f"expected positive integers like 8,16,64, got {text}")
        return [int(number) for number in text.split(",")]

    listed = [provider.name for provider in PROVIDERS]
    what = parser.getgroup("bora benchmarks: what is measured")
    what.addoption("--levels", type=names(LEVELS), help="layer,model (default: both)")
    what.addoption("--modes", type=names(MODES), help=f"{','.join(MODES)} (default: all; step is forward and backward)")
    what.addoption("--providers", type=names(listed), help=f"of {', '.join(listed)} (default: those of the goals)")
    what.addoption("--shapes", type=shapes, help="layer shapes as out_features x in_features: 4096x4096,14336x4096")
    what.addoption("--tokens", type=integers, help="tokens of the layer's input: 2048,8192")
    what.addoption("--ranks", type=integers, help="ranks of the adapters: 8,16,64")
    what.addoption(
        "--dtypes",
        type=names(DTYPES),
        help="dtypes of the base: bf16,fp16,fp32 (default: bf16, on the CPU fp32)",
    )
    what.addoption(
        "--cases",
        help="patterns of names of cases, to split a run: 'step-*-nf4*,step-llama3-8b-4x2048-*' (default: *)",
    )
    what.addoption("--quick", action="store_true", help="one shape, one model batch, and fewer rounds")
    what.addoption(
        "--full",
        action="store_true",
        help="more modes of each layer and model, and every provider: more than twice the measurements",
    )
    what.addoption(
        "--sweep",
        action="store_true",
        help="only BoRA beside LoRA fused by hand over widths, tokens and ranks; --shapes, --tokens, --ranks choose",
    )
    how = parser.getgroup("bora benchmarks: how and where")
    how.addoption("--minutes", type=float, help="end a sweep after so many; --resume goes on with it")
    how.addoption("--resume", type=Path, help="the JSON file of a sweep whose time was over")
    how.addoption("--device", help="cuda or cpu (default: cuda where there is one)")
    how.addoption(
        "--budget",
        type=float,
        help="seconds of timed rounds for each measurement (default: 0.15; 0.1 with --quick)",
    )
    how.addoption("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    how.addoption("--commit", help="the commit that is measured (default: what git says)")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install '.[benchmark]'")
    option = config.option
    if hasattr(config, "workerinput") or getattr(option, "numprocesses", None):
        raise pytest.UsageError("benchmarks run one after another: leave out -n")
    device = torch.device(option.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not option.sweep and (option.minutes or option.resume):
        raise pytest.UsageError("--minutes and --resume are of --sweep")
    budget = option.budget or (0.1 if option.quick else 0.05 if option.sweep else 0.15)
    least_rounds = 3 if option.quick else 10 if device.type == "cuda" else 5
    config.stash[_HARNESS] = Harness(device, budget, least_rounds, option.commit, option.results)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files of levels that are not asked for, and the sweep, which runs by itself."""
    if collection_path.suffix == ".py" and collection_path.name.startswith("test_"):
        if (collection_path.name == "test_sweep.py") != config.option.sweep:
            return True
    others = set(LEVELS) - set(config.option.levels or LEVELS)
    return True if collection_path.name in {f"test_{level}.py" for level in others} else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case with every provider that has a place in it, all providers of a case after one another."""
    if "case" not in metafunc.fixturenames:
        return
    option, device = metafunc.config.option, metafunc.config.stash[_HARNESS].device
    chosen = {name: getattr(option, name) for name in ("ranks", "dtypes", "modes", "quick", "full")}
    if metafunc.module.LEVEL == "layer":
        cases = layer_cases(device.type, shapes=option.shapes, tokens=option.tokens, **chosen)
    else:
        cases = model_cases(device.type, **chosen)
    cases = [case for case in cases if case.matches(option.cases)]
    names = option.providers or [provider.name for provider in PROVIDERS]
    providers = [provider for provider in PROVIDERS if provider.name in names]
    clock = measure.timer(device)
    metafunc.parametrize(
        "case, provider",
        [
            pytest.param(
                case,
                provider,
                id=f"{case}-{provider.name}",
                marks=pytest.mark.benchmark(group=f"{case.level} {case}", timer=clock, disable_gc=True),
            )
            for case in cases
            for provider in providers
            if provider.runs(case) and (option.full or option.providers or provider.by_default(case))
        ],
    )


@pytest.fixture(scope="session")
def harness(pytestconfig: pytest.Config) -> Harness:
    return pytestconfig.stash[_HARNESS]


def pytest_report_header(config: pytest.Config) -> list[str]:
    facts = config.stash[_HARNESS].environment
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"device: {facts['device']}" + (f" ({facts['gpu']})" if "gpu" in facts else f" ({facts['cpu']})"),
        f"versions: {versions}; commit {facts['commit']}",
        f"clock: {facts['clock']}",
    ]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.option.sweep:
        terminalreporter.section("sweep")
        terminalreporter.line(sweep.table(config.stash[_HARNESS].records))
    if path := config.stash[_HARNESS].path:
        terminalreporter.section("result")
        terminalreporter.line(f"{path}; tables and charts: python -m benchmarks.report {path}")
