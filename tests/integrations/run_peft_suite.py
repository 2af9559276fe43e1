"""Runs PEFT's own generic tests of tuners with ``BoraConfig`` in the place of ``LoraConfig``.

    python tests/integrations/run_peft_suite.py PATH [OPTIONS FOR PYTEST]

PATH is a checkout or an unpacked source distribution of the installed version of PEFT. Its tests/test_custom_models.py
runs as it is; only its lists of parameters are changed while pytest collects it: each row of plain LoRA becomes two
rows of BoRA, one for each order of the norms, each row of DoRA becomes one of DoRA on this package's layers, and the
rows of other methods are left out. Rows that BoRA refuses (other variants of LoRA, MultiheadAttention,
target_parameters, grouped convolutions) are listed with what the refusal says. Tests of what BoRA does not have, such
as several active adapters, are expected to fail, each with its reason. Without a network, HF_HUB_OFFLINE=1 makes
the few tests that load a model from the hub fail at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parents[2]))
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402

_ONE_ACTIVE = "several active or merged adapters are refused: adapters that normalize the weight do not add up"
_HUB = "needs a model from the hub"
_STEP = "its learning rate moves this model's LoRA by 1e-4 and BoRA by less; DoRA gets 200 times that rate in the test"
_ONE_BY_ONE = "this model's weight has one row and one column: the magnitude that is taken first has no effect on it"
EXPECTED_FAILURES = {
    "test_active_adapter": _ONE_ACTIVE,
    "test_merge_layers_multi": _ONE_ACTIVE,
    "test_multiple_active_adapters_forward": _ONE_ACTIVE,
    "test_multiple_active_adapters_merge_and_unmerge": _ONE_ACTIVE,
    "test_multiple_active_adapters_with_different_modules_to_save_works": _ONE_ACTIVE,
    "test_multiple_active_adapters_with_overlapping_modules_to_save_raises": _ONE_ACTIVE,
    "test_multiple_active_adapters_with_same_modules_to_save_raises": _ONE_ACTIVE,
    "test_sequential_merge_matches_batch_merge": _ONE_ACTIVE,
    "test_unmerge_after_sequential_merge_restores_base": _ONE_ACTIVE,
    "test_only_params_are_updated": _STEP,
    "test_delete_adapter_multiple_adapters_with_trainable_token_indices": _HUB,
    "test_dora_save_and_load_remapping": _HUB,
    "test_gpt2_dora_merge_and_unload": _HUB,
    "test_gpt2_dora_merge_and_unload_safe_merge": _HUB,
    "test_multiple_adapters_automatic_modules_to_save": _HUB,
    "test_multiple_adapters_no_needless_copy_modules_to_save": _HUB,
    "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters": _HUB,
    "test_override_lora_linear": _HUB,
    "test_pvera_reproducible": _HUB,
}
RAISED = {_ONE_ACTIVE: (ValueError, AssertionError), _HUB: OSError, _STEP: AssertionError, _ONE_BY_ONE: AssertionError}
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

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            reason = EXPECTED_FAILURES.get(item.originalname)
            if reason is _STEP and "-Conv1d-" in item.name:
                reason = _ONE_BY_ONE
            if reason and (reason is not _STEP or "EmbConv1D" in item.name):
                item.add_marker(pytest.mark.xfail(reason=reason, raises=RAISED[reason]))

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
