"""Tables of the report, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .methods import METHODS


def rows(header: Sequence[str], lines: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table; the first columns are ``text``, the others are set to the right."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def signed(number: float) -> str:
    """With its sign, two digits, and a minus that is one; no "−0.00"."""
    text = f"{number:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def scientific(rate: float) -> str:
    """A learning rate as 2.4e-3."""
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def interval(low: float, high: float) -> str:
    return f"[{signed(low)}, {signed(high)}]"


def around(mean: float, half: float) -> str:
    return f"{signed(mean)} ± {half:.2f}"


def difference(pair: tuple[str, str]) -> str:
    """BoRA − LoRA."""
    return " − ".join(METHODS[method].label for method in pair)
