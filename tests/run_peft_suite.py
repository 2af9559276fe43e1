"""Runs PEFT's own generic tests of tuners with ``BoraConfig`` in the place of ``LoraConfig``.

    python tests/run_peft_suite.py PATH [OPTIONS FOR PYTEST]

PATH is a checkout or an unpacked source distribution of the installed version of PEFT. Its tests/test_custom_models.py
runs as it is; only its lists of parameters are changed while pytest collects it: each row of plain LoRA becomes two
rows of BoRA, one for each order of the norms, each row of DoRA becomes one of DoRA on this package's layers, and the
rows of other methods are left out. Options that BoRA refuses (other variants of LoRA, MultiheadAttention,
target_parameters, grouped convolutions) are counted as refused, and what the refusal says is printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402

REFUSED_MODELS = ("MHA", "Conv2dGroups", "Conv2dGroups2", "MlpUsingParameters")


class SuiteConfig(BoraConfig):
    """BoraConfig under the keyword that PEFT's tests give to configurations which they do not know."""

    def __init__(self, *args, init_weights: bool | str | None = None, **kwargs) -> None:
        if init_weights is not None:
            kwargs["init_lora_weights"] = init_weights
        super().__init__(*args, **kwargs)


class BoraRows:
    """A pytest plugin that rewrites lists of parameters in place; several tests share each list."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.refused: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for mark in metafunc.definition.iter_markers("parametrize"):
            rows = mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"]
            if isinstance(rows, list) and id(rows) not in self.seen:
                self.seen.add(id(rows))
                if any(row is LoraConfig for row in rows):
                    rows[:] = [SuiteConfig]
                elif any(isinstance(row, tuple) and LoraConfig in row for row in rows):
                    rows[:] = [new for row in rows for new in self.bora_rows(row)]

    def bora_rows(self, row: tuple) -> list[tuple]:
        """A row (name, model, config class, options...) as rows of BoRA; none for other methods and refused options."""
        if not isinstance(row, tuple) or LoraConfig not in row:
            return []
        if row[1] in REFUSED_MODELS:
            self.refused[row[0]] = f"Target module is not supported ({row[1]})"
            return []
        options = [value for value in row if isinstance(value, dict)]
        orders = ("row_col",) if any(option.get("use_dora") for option in options) else ("row_col", "col_row")
        new = []
        for order in orders:
            changed = [{**v, "norm_order": order} if isinstance(v, dict) else v for v in row]
            changed = [SuiteConfig if value is LoraConfig else value for value in changed]
            try:
                for option in changed:
                    if isinstance(option, dict):
                        BoraConfig(**option)
            except ValueError as error:
                self.refused[row[0]] = str(error)
                return []
            new.append((f"{row[0]} {order}", *changed[1:]))
        return new

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.section("rows that BoraConfig refuses")
        for name, message in self.refused.items():
            terminalreporter.line(f"{name}: {message}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkout of PEFT")
    arguments, options = parser.parse_known_args()
    tests = arguments.path / "tests" / "test_custom_models.py"
    if not tests.is_file():
        parser.error(f"PATH must hold tests/test_custom_models.py, got {arguments.path}")
    # PEFT's tests import each other as a package; a source distribution comes without its __init__.py.
    (tests.parent / "__init__.py").touch()
    return pytest.main(
        [str(tests), "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={arguments.path}", *options], [BoraRows()]
    )


if __name__ == "__main__":
    raise SystemExit(main())
