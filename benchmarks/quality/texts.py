"""Tasks made from texts: reading the sources, and which part of the data a text belongs to."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_SALT = "bora-quality"


@dataclass(frozen=True)
class Example:
    """A text, its label or rating, and what decides on its part of the data."""

    text: str
    label: float
    group: str


def part_of(group: str) -> int:
    """0 training (15 of 32), 1 validation (6), 2 test (11): by a hash, so that equal groups are never in two parts."""
    place = hashlib.sha256(f"{_SALT}:{group}".encode()).digest()[0] // 8
    return 0 if place < 15 else 1 if place < 21 else 2


def parts(groups: Iterable[str]) -> np.ndarray:
    return np.array([part_of(group) for group in groups], dtype=np.uint8)


def rated(content: bytes) -> dict[str, float]:
    """Texts and their mean ratings from lines "number<tab>rating<tab>text"; a text that comes twice is kept once."""
    rows = (line.split("\t", 2) for line in content.decode("utf-8", "replace").splitlines())
    return {row[2].strip(): float(row[1]) for row in rows if len(row) == 3}


def regression(ratings: dict[str, float]) -> list[Example]:
    return [Example(text, rating, text) for text, rating in ratings.items()]


def signs(ratings: dict[str, float]) -> list[Example]:
    """Whether the rating is positive; a text rated 0 is of neither class."""
    return [Example(text, float(rating > 0), text) for text, rating in ratings.items() if rating != 0]


def classes(content: bytes, column: str = "sentiment") -> list[Example]:
    """Texts of a csv file and the number of their class, classes in alphabetical order."""
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8", "replace"), newline="")))
    names = sorted({row[column] for row in rows})
    labels = {row["text"].strip(): float(names.index(row[column])) for row in rows}
    return [Example(text, label, text) for text, label in labels.items()]


def swaps(documents: Iterable[str], seed: int = 2412) -> list[Example]:
    """Sentences of 8 to 26 words, in half of which two neighbouring words, lower-case and unlike, changed places.

    A sentence belongs to the part of its document.
    """
    rng = random.Random(seed)
    found: dict[str, Example] = {}
    for document in documents:
        for sentence in _SENTENCE_END.split(document):
            words = sentence.split()
            if not (8 <= len(words) <= 26 and sentence.endswith(".")):
                continue
            places = [i for i in range(1, len(words) - 2) if _can_swap(words[i], words[i + 1])]
            if not places:
                continue
            swapped = rng.random() < 0.5
            if swapped:
                i = rng.choice(places)
                words[i], words[i + 1] = words[i + 1], words[i]
            text = " ".join(words)
            found.setdefault(text, Example(text, float(swapped), document))
    return list(found.values())


def _can_swap(first: str, second: str) -> bool:
    return first != second and all(word.isalpha() and word.islower() for word in (first, second))


def sums(count: int, seed: int = 7) -> list[tuple[str, str]]:
    """Questions "What is a + b? Answer:" of numbers of three digits, each once, with their answers."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        found[f"What is {a} + {b}? Answer:"] = f" {a + b}."
    return list(found.items())
